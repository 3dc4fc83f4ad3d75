"""The subjects that the pretraining text talks about.

A domain is a kind of thing (hotels, weather, animals, ...) with a name, optional fields and several ways
of saying each field. Every string here is a pattern: `a|b|c` is a choice and `{maker}` is a random value of
that kind (see `VALUE_MAKERS` in pretraining_text.py). In openings and predicates `{field}` is the value of
that field.

Neither of the demo's two tasks is here: nothing in this file is about films or trains.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Domain:
    noun: str
    name: str  # pattern of the entity's name
    fields: dict[str, str]  # field name -> pattern of its value
    openings: tuple[str, ...]  # whole sentences that introduce the entity by name
    predicates: tuple[str, ...]  # verb phrases, put after a subject: "{name} has {rooms} rooms"
    pronoun: str = "it"  # "" for people, who are called by their name or by their noun


# fmt: off
DOMAINS = (
    Domain(
        "hotel", "Hotel {made}|The {adjective} {Thing} Hotel|{place} Lodge|The {Thing} and {Thing} Inn",
        {"city": "{place}", "stars": "two|three|four|five", "price": "{price}", "rooms": "{number}",
         "view": "the sea|the park|the old castle|the mountains|the market square", "breakfast": "{clock}"},
        ("{name} is a hotel in {city}.", "{name} is a {stars}-star hotel in {city}.",
         "In {city} there is a {stars}-star hotel called {name}.", "{name} is a {stars}-star hotel.",
         "If you need a room with a view of {view}, try {name}.", "A room at {name} costs {price} a night."),
        ("is in {city}", "stands in the centre of {city}", "has {stars} stars", "has {rooms} rooms",
         "offers {rooms} rooms", "charges {price} a night", "looks out over {view}", "has a view of {view}",
         "serves breakfast from {breakfast}", "starts serving breakfast at {breakfast}")),
    Domain(
        "weather report", "{place}",
        {"day": "{weekday}", "sky": "sunny|cloudy|rainy|foggy|snowy|clear|stormy", "high": "{number} degrees",
         "low": "{number} degrees", "wind": "light|strong|gentle|cold|northerly|westerly",
         "rain chance": "{number} percent"},
        ("It will be {sky} in {name} on {day}.", "{day} will be {sky} in {name}.",
         "Expect {sky} weather in {name}.",
         "The weather in {name} will be {sky}, with a high of {high}.", "{name} will be {sky} on {day}."),
        ("will reach {high}", "has a high of {high}", "will have a low of {low}",
         "will cool down to {low} at night",
         "will have a {wind} wind", "expects a {wind} wind", "has a {rain chance} chance of rain",
         "will be {sky}", "has its report for {day}")),
    Domain(
        "painter|writer|singer|doctor|teacher|baker|runner|scientist|farmer|lawyer", "{person}",
        {"born": "{year}", "birthplace": "{place}", "home": "{place}", "hobby": "{hobby}", "age": "{number}",
         "married to": "{person}", "prize": "the {adjective} {Thing} Prize"},
        ("{name} is a {noun} from {birthplace}.", "{name}, born in {born}, is a {noun}.",
         "{name} was born in {birthplace}.",
         "{name} was born in {birthplace} in {born}.", "The {noun} {name} lives in {home}.",
         "Born in {born}, {name} is a {noun}."),
        ("was born in {born}", "comes from {birthplace}", "grew up in {birthplace}", "lives in {home}",
         "now works in {home}", "loves {hobby}", "spends the weekends {hobby}", "is {age} years old",
         "is married to {married to}", "married {married to}", "won {prize}", "was awarded {prize}"), ""),
    Domain(
        "cat|dog|horse|parrot|rabbit|goat|turtle|fox|owl", "{made}|{first}|Mr {made}|Old {made}",
        {"age": "{number} years", "colour": "{colour}", "food": "{food}", "owner": "{person}",
         "habit": "{habit}",
         "weight": "{number} kilos"},
        ("{name} is a {colour} {noun}.", "{name} is a {noun} that belongs to {owner}.",
         "{owner} has a {noun} called {name}.",
         "The {colour} {noun} is called {name}.", "There was once a {noun} called {name}."),
        ("is {age} old", "is {colour}", "likes to eat {food}", "eats {food} every day", "belongs to {owner}",
         "lives with {owner}", "likes to {habit}", "weighs {weight}")),
    Domain(
        "match", "{place} {team}",
        {"opponent": "{place} {team}", "score": "{small} to {small}", "scorer": "{person}", "crowd": "{big}",
         "ground": "{made} Park|the {adjective} Field|{made} Arena", "day": "{weekday}", "coach": "{person}"},
        ("{name} beat {opponent} {score}.", "{name} lost to {opponent} by {score}.",
         "{name} played against {opponent} at {ground}.",
         "On {day}, {name} met {opponent}.", "{scorer} was the hero of the match for {name}.",
         "{name} drew with {opponent} on {day}."),
        ("beat {opponent}", "played in front of {crowd} people", "drew a crowd of {crowd}",
         "played at {ground}",
         "scored through {scorer}", "thanked {scorer} for the best goal", "won by {score}", "played on {day}",
         "is coached by {coach}", "has {coach} as its coach")),
    Domain(
        "soup|cake|pie|salad|stew|bread", "{made} {noun}|{adjective} {food} {noun}|{place} {noun}",
        {"ingredient": "{food}", "extra": "{food}", "time": "{number} minutes", "serves": "{small}",
         "oven": "{number}0 degrees", "cook": "{person}"},
        ("{name} is made with {ingredient}.", "{name} is a {noun} with {ingredient} and {extra}.",
         "To make {name} you need {ingredient}.",
         "{cook} has a recipe for {name}.", "{name} is a {noun} by {cook}.",
         "Here is how to make {name} in {time}."),
        ("takes {time}", "is ready in {time}", "serves {serves}", "is enough for {serves} people",
         "needs {ingredient}",
         "goes well with {extra}", "also contains {extra}", "bakes at {oven}", "was invented by {cook}")),
    Domain(
        "city|town|village|port", "{place}",
        {"people": "{big}", "river": "the {made}", "mayor": "{person}", "founded": "{year}",
         "region": "{made} County|the {adjective} Hills|{place}shire",
         "known for": "its {food}|its {thing}s|its {adjective} {thing}|its {colour} houses"},
        ("{name} is a {noun} in {region}.", "{name} is a {noun} of {people} people.",
         "{name} is a {noun} on {river}.",
         "The {noun} of {name} was founded in {founded}.", "Founded in {founded}, {name} is a {noun}."),
        ("has {people} inhabitants", "is home to {people} people", "lies on {river}",
         "stands beside {river}", "has a mayor called {mayor}",
         "is led by {mayor}", "was founded in {founded}", "dates from {founded}", "is known for {known for}",
         "belongs to {region}")),
    Domain(
        "book|novel|poem|play", "{title}",
        {"author": "{person}", "pages": "{number}", "year": "{year}",
         "subject": "{hobby}|the {thing}s of {place}|{food}",
         "publisher": "{made} Press|{made} and {made}", "hero": "{person}", "price": "{price}"},
        ("{name} is a {noun} by {author}.", "{author} wrote {name}.",
         "{author} is the author of {name}, a {noun} about {subject}.",
         "{name}, published in {year}, is a {noun}.", "The {noun} {name} tells the story of {hero}.",
         "{name} was written by {author} in {year}."),
        ("has {pages} pages", "is {pages} pages long", "appeared in {year}", "came out in {year}",
         "is about {subject}",
         "was published by {publisher}", "tells the story of {hero}", "costs {price}",
         "was written by {author}")),
    Domain(
        "shop|bakery|bookshop|market",
        "{made}'s|The {adjective} {Thing}|{person} and Sons|{Thing} and {Thing}",
        {"street": "{made} Street|{Thing} Lane|{place} Road",
         "sells": "{food} and {food}|{colour} {thing}s|{thing}s", "opens": "{clock}",
         "closes": "{clock}", "owner": "{person}", "phone": "{big} {big}"},
        ("{name} is a {noun} on {street}.", "{name} sells {sells}.", "{owner} owns a {noun} called {name}.",
         "On {street} you will find {name}.", "You can buy {sells} at {name}.", "{name} is run by {owner}."),
        ("sells {sells}", "is on {street}", "can be found on {street}", "opens at {opens}",
         "is open from {opens}", "closes at {closes}",
         "stays open until {closes}", "is run by {owner}", "belongs to {owner}", "can be called on {phone}")),
    Domain(
        "phone|lamp|bicycle|chair|camera|clock|bag",
        "{made} {number}|{made} {letter}{small}|{adjective} {made}",
        {"maker": "{company}", "price": "{price}", "colour": "{colour}", "weight": "{number} grams",
         "material": "{material}",
         "battery": "{number} hours", "rating": "{small} out of ten"},
        ("The {name} is a {noun} made by {maker}.", "The {name} is a {colour} {noun}.",
         "The {name} is a {noun} that costs {price}.",
         "{maker} makes the {name}.", "For {price} you can buy the {name}.",
         "The {name} by {maker} is a {noun} made of {material}."),
        ("costs {price}", "sells for {price}", "weighs {weight}", "is made of {material}",
         "comes in {colour}", "is {colour}",
         "runs for {battery}", "was rated {rating}", "has a rating of {rating}", "is made by {maker}")),
    Domain(
        "museum|gallery|library", "{made} {kind_name}|The {adjective} {Thing} Collection|{place} House",
        {"city": "{place}", "shows": "{colour} {thing}s|old {thing}s|{material} {thing}s",
         "ticket": "{price}", "closed": "{weekday}",
         "guide": "{person}", "visitors": "{big}"},
        ("{name} is a {noun} in {city}.", "{name} is a {noun} of {shows}.", "Visit {name} to see {shows}.",
         "In {city} you can visit {name}.", "Tickets for {name} cost {ticket}.",
         "{name} in {city} shows {shows}."),
        ("is in {city}", "shows {shows}", "has a collection of {shows}", "charges {ticket}",
         "costs {ticket} to enter",
         "is closed on {closed}", "is not open on {closed}", "offers tours by {guide}",
         "had {visitors} visitors last year")),
    Domain(
        "festival|concert|lecture|party|meeting|fair", "{title}|The {place} {kind_name}|{adjective} {month}",
        {"place": "{place}|{made} Hall|the {adjective} {Thing}", "date": "{date}",
         "starts": "{clock}", "speaker": "{person}", "topic": "{hobby}|{thing}s|{food}",
         "tickets": "{price}", "seats": "{number}"},
        ("{name} is a {noun} in {place}.", "{name} takes place on {date}.",
         "On {date} there is a {noun} called {name}.",
         "{name} is a {noun} about {topic}.", "Join us for {name} at {starts}.",
         "{speaker} will speak at {name} on {date}."),
        ("starts at {starts}", "begins at {starts}", "takes place at {place}", "will be held on {date}",
         "welcomes {speaker}",
         "has {speaker} as its guest", "is about {topic}", "costs {tickets}", "has room for {seats} people")),
    Domain(
        "flower|tree|bush|herb", "{made}ia|{adjective} {made}|{colour} {made}",
        {"colour": "{colour}", "height": "{number} centimetres", "blooms": "{month}",
         "soil": "dry|wet|sandy|rich|stony", "grows in": "{place}",
         "use": "tea|medicine|soap|soup|paint"},
        ("{name} is a {noun} with {colour} leaves.", "{name} is a {noun} that grows in {grows in}.",
         "In {blooms} the {noun} {name} blooms.",
         "The {noun} {name} grows {height} tall.", "{name} grows in {soil} soil."),
        ("grows to {height}", "is {height} tall", "blooms in {blooms}", "flowers from {blooms}",
         "likes {soil} soil", "needs {soil} soil",
         "is found in {grows in}", "is used for {use}", "can be made into {use}", "has {colour} flowers")),
    Domain(
        "mountain|lake|island|forest|valley",
        "{made} {kind_name}|The {adjective} {kind_name}|Mount {made}|Lake {made}",
        {"country": "{made}land|{made}ia", "size": "{number} miles|{big} metres", "explorer": "{person}",
         "nearest town": "{place}",
         "animals": "wild {thing}s|{colour} birds|goats and bears|deer", "best month": "{month}"},
        ("{name} is a {noun} in {country}.", "{name} is a {noun} near {nearest town}.",
         "In {country} lies {name}.",
         "{explorer} discovered {name}.", "The {noun} of {name} measures {size}."),
        ("lies in {country}", "measures {size}", "was discovered by {explorer}",
         "was first mapped by {explorer}", "is close to {nearest town}",
         "is home to {animals}", "is full of {animals}", "is best visited in {best month}",
         "is most beautiful in {best month}")),
    Domain(
        "course|class|school", "{made} {kind_name}|{hobby_name} for Beginners|The {place} {kind_name}",
        {"teacher": "{person}", "room": "{number}", "day": "{weekday}", "fee": "{price}",
         "students": "{number}", "level": "easy|hard|basic|advanced"},
        ("{name} is a {level} {noun}.", "{name} is a {noun} taught by {teacher}.",
         "{teacher} teaches {name}.",
         "Every {day}, {name} meets in room {room}.", "{name} has {students} students.",
         "The {noun} {name} costs {fee}."),
        ("meets on {day}", "takes place every {day}", "uses room {room}", "is held in room {room}",
         "costs {fee}", "has {students} students",
         "is taught by {teacher}", "is led by {teacher}", "is {level}")),
    Domain(
        "flat|house|cottage|office", "{number} {made} Street|{number} {Thing} Lane|{made} {kind_name}",
        {"rent": "{price}", "rooms": "{small}", "floor": "first|second|third|top", "agent": "{person}",
         "garden": "small|large|shared|sunny", "free from": "{date}",
         "town": "{place}"},
        ("{name} is a {noun} in {town}.", "{name} is a {noun} with {rooms} rooms.",
         "A {noun} is to let at {name} in {town}.",
         "{agent} is renting out {name}.", "The rent for {name} is {rent}."),
        ("has {rooms} rooms", "costs {rent} a month", "is on the {floor} floor", "has a {garden} garden",
         "is free from {free from}",
         "is available on {free from}", "can be seen with {agent}", "is let by {agent}", "is in {town}")),
    Domain(
        "company|firm|studio|factory", "{company}",
        {"boss": "{person}", "makes": "{material} {thing}s|{colour} {thing}s|{food}", "staff": "{big}",
         "started": "{year}", "based in": "{place}",
         "sales": "{number} million"},
        ("{name} is a {noun} in {based in}.", "{name} is a {noun} that makes {makes}.",
         "{boss} started {name} in {started}.",
         "{boss} is the head of {name}.", "Since {started}, {name} has made {makes}."),
        ("makes {makes}", "is based in {based in}", "has its office in {based in}", "employs {staff} people",
         "has a staff of {staff}",
         "was started in {started}", "began in {started}", "is led by {boss}", "had sales of {sales}")),
    Domain(
        "song|album|dance", "{title}",
        {"singer": "{person}", "band": "The {adjective} {Thing}s|{made}", "minutes": "{small}",
         "year": "{year}", "style": "folk|rock|jazz|classical|pop",
         "copies": "{big}"},
        ("{name} is a {style} {noun}.", "{name} is a {noun} by {band}.", "{singer} sang {name} in {year}.",
         "{name} is a {year} {noun} by {singer}.", "The {style} {noun} {name} was recorded by {band}.",
         "{band} recorded {name} with {singer}."),
        ("lasts {minutes} minutes", "was recorded in {year}", "is from {year}", "sold {copies} copies",
         "features {singer}",
         "was sung by {singer}", "was played by {band}", "is a {style} piece")),
    Domain(
        "ship|boat|castle|tower|bridge", "The {adjective} {Thing}|{made}|The {made}",
        {"built": "{year}", "builder": "{person}|{company}", "length": "{number} metres",
         "colour": "{colour}", "owner": "{person}", "made of": "{material}"},
        ("{name} is a {noun} built in {built}.", "{name} is a {noun} made of {made of}.",
         "{builder} built {name}.",
         "Built by {builder}, {name} is a {noun}.", "{owner} is the owner of {name}, a {noun}.",
         "{name} is a {colour} {noun}."),
        ("was built in {built}", "was built by {builder}", "is {length} long", "measures {length}",
         "is painted {colour}",
         "belongs to {owner}", "is made of {made of}", "was the work of {builder}")),
)

# fmt: on


def split_words(text: str) -> list[str]:
    return text.split()


def split_options(text: str) -> list[str]:
    return text.split("|")


FIRST_NAMES = split_words(
    "Anna Ben Clara David Ella Felix Grace Henry Iris Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tara "
    "Victor Wendy Adam Beth Carl Dora Emil Fiona George Helen Ivan Julia Karl Lucy Mark Nina Oscar "
    "Petra Quinn Ruth Simon Tom Una Walter Zoe"
)
ADJECTIVES = split_words(
    "Golden Silver Quiet Happy Little Great Old New Blue Red Green White Black Lucky Brave Broken "
    "Hidden Royal Gentle Wild Sleepy Bright Cold Warm Ancient Empty Flying Singing Dancing Honest "
    "Clever Proud Simple Sweet Tall Tiny Round Northern"
)
THINGS = split_words(
    "apple bear boat book bottle box bridge candle castle chair clock cloud crown cup door dragon drum "
    "eagle feather field fire flag fox garden ghost hammer hat heart horse house island key king lamp "
    "leaf letter lion map mirror moon mountain ocean owl path pearl pen queen rabbit ring river road "
    "rose sailor shadow shell ship sparrow star stone storm summer sun sword table tiger tower tree "
    "wall wave wheel window winter wolf bell bird branch coat cat dog forest lake"
)
TITLE_NOUNS = split_words(
    "adventure afternoon airport answer army artist audience autumn balcony basket battle bedroom "
    "beginning birthday blanket brother building butterfly button cabin captain carpet century chapter "
    "chimney circle commander compass cottage country courage cousin customer danger daughter decision "
    "department diamond dinner direction discovery distance education election elephant emperor "
    "entrance evidence experiment explorer expression factory farewell fashion fortune foundation "
    "friend future general gentleman grandfather hospital hotel hunter instrument invention invitation "
    "jacket journey judgement kingdom ladder landscape language lawyer lesson library magazine manager "
    "marriage meadow measure message midday minister minute miracle monster morning motion mother "
    "movement murder mystery nation necklace night number occasion opinion orchestra painter palace "
    "parade partner pattern payment performance permission pilot pirate pocket position prisoner "
    "problem professor question quarter rainbow reason relation reporter return scholar science "
    "sentence servant silence sister soldier solution spider spring statement student surprise teapot "
    "temple theatre thunder traveller treasure trouble umbrella university vacation victory village "
    "violin voyage warrior weather wedding whisper wilderness winner wisdom writer yesterday"
)
TITLE_ADJECTIVES = split_words(
    "Beautiful Bitter Blind Careful Certain Charming Common Cruel Curious Dangerous Dark Deep Different "
    "Difficult Double Dreadful Eastern Electric Endless Enormous Eternal Faithful Famous Fantastic "
    "First Foreign Fresh Friendly Funny Generous Glorious Grand Guilty Heavy Human Hungry Important "
    "Impossible Innocent International Jealous Long Magic Married Marvellous Mighty Modern Mysterious "
    "Narrow National Natural Noble Ordinary Other Painted Peaceful Poor Possible Powerful Precious "
    "Private Public Quick Remarkable Rich Sacred Scientific Serious Seventh Shining Short Single Slow "
    "Small Southern Special Strange Sudden Terrible Third Tragic Twelve Unexpected Unknown Useful "
    "Valuable Violent Western Wise Wonderful Young"
)
FOODS = split_words(
    "apples bread butter carrots cheese cherries corn eggs fish garlic honey lemons milk mushrooms nuts "
    "onions oranges peas pepper plums potatoes rice salt spinach sugar tomatoes beans pears ginger "
    "pumpkin leeks olives cream chicken"
)
COLOURS = split_words("red blue green yellow black white brown grey purple orange pink gold silver")
MATERIALS = split_words("wood steel glass stone paper leather wool cotton plastic copper brick clay iron")
HOBBIES = split_options(
    "painting|cooking|reading|swimming|running|gardening|fishing|dancing|singing|walking in the hills|"
    "playing chess|riding horses|collecting stamps|baking bread|mending clocks|watching birds|"
    "writing letters|sailing|climbing|sewing"
)
HABITS = split_options(
    "sleep in the sun|chase birds|hide under the bed|run in the garden|sit on the wall|"
    "play with a ball|swim in the river|sing at night|climb trees|wait by the door|watch the moon"
)
TEAMS = split_options("United|Rovers|City|Tigers|Lions|Wanderers|Eagles|Town|Stars|Giants")

LAST_NAMES = split_words(
    "Smith Johnson Brown Taylor Miller Wilson Davies Evans Thomas Roberts Walker Wright Robinson "
    "Thompson Anderson Martin Jackson Harris Cooper Morgan Bennett Collins Parker Campbell Stewart "
    "Schmidt Hansen Larsen Kowalski Rossi Bianchi Fernandez Garcia Lopez Santos Silva Dubois Laurent "
    "Weber Fischer Becker Yamamoto Suzuki Singh Patel Kumar Nguyen Chen Wang Hassan Ibrahim Mensah "
    "Diallo Andersson Nielsen Berger Murphy O'Brien Kelly Sullivan MacDonald Fraser Henderson "
    "Richardson Blackwood Ashworth Fairfax Holloway Pemberton Winterbourne Castellano Delacroix Vasquez "
    "Ramirez Gonzalez Mendoza Carvalho Pereira Popescu Horvath Nowak Sokolov Volkov Demir Yilmaz Rahman "
    "Chowdhury Watanabe Kobayashi"
)
PLACES = split_words(
    "London Paris Rome Sydney Melbourne Amsterdam Brussels Copenhagen Stockholm Helsinki Hamburg Munich "
    "Zurich Geneva Milan Turin Florence Barcelona Valencia Porto Manchester Liverpool Bristol Leeds "
    "Edinburgh Cardiff Belfast Oxford Cambridge York Bath Norwich Exeter Plymouth Bombay Delhi "
    "Singapore Shanghai Osaka Seoul Manila Jakarta Montreal Vancouver Denver Seattle Houston Dallas "
    "Miami Santiago Bogota Winchester Canterbury Nottingham Birmingham Southampton Newcastle Sunderland "
    "Lancaster Peterborough Wellington Auckland Adelaide Johannesburg Casablanca Alexandria Istanbul "
    "Bucharest Belgrade Rotterdam Strasbourg Bordeaux Salzburg Frankfurt Philadelphia Minneapolis"
)
PLACE_WORDS = split_words(
    "Bridge Church Park Hill Green Cross Lane Wood Heath Bay Beach Court Common Garden Mill Market Valley Abbey Water Road"
)

WEEKDAYS = split_words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = split_words("January February March April May June July August September October November December")
SMALL_NUMBERS = split_words("two three four five six")
FEELINGS = split_words("happy sad tired angry proud cold hungry glad")
LETTER_STARTS = split_options("I want to tell you about|you asked me about|here is what I know about|have you heard of")

# Made-up names for everything else: what the model must learn is to copy a name, not to know it.
ONSETS = split_words("b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh sk st t th tr v w z bl cr gl")
VOWELS = split_words("a e i o u a e i o ai ea oo ou ar er or al en in on an el")
CODAS = split_words("n r l s t m d ck ll nd rt ss th x") + [""] * 12
PLACE_ENDINGS = split_words("ton ford by wick mouth stead field dale port ville burg ham well mere gate")
PLACE_FIRST_WORDS = split_words("Port Saint North East Upper Lower Great Little New Castle Mount")

# For documents about nothing in particular: any of these words can be a field, with any value.
ANY_FIELDS = split_words(
    "colour size price owner maker weight age number place date name code type shape taste level "
    "language leader partner source target status title subject sponsor winner guest driver pilot "
    "captain doctor helper neighbour friend enemy reason goal tool load speed length width depth height "
    "power cost value rank grade class team group family order phone street region country island "
    "valley season weather mood sound smell voice style mark symbol start end"
)
