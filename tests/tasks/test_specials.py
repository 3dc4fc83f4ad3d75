"""Special tokens stand in a prompt that is generated from as they stood in training."""

from __future__ import annotations

from pipeline.tasks.example import Sequence
from pipeline.tasks.specials import Specials

SPECIALS = Specials(prefix=2, infix=3, first_id=50)


def test_a_prompt_is_what_was_trained_up_to_its_completion():
    around = SPECIALS.around(Sequence((7, 8, 9, 4), ((2, 4),)))
    assert around.tokens == (50, 51, 7, 8, 52, 53, 54, 9, 4)
    assert around.spans == ((7, 9),)
    assert SPECIALS.prompt([7, 8]) == list(around.tokens[:7])


def test_an_encoder_s_first_token_stays_first_and_its_texts_are_found():
    around = SPECIALS.around(Sequence((1, 7, 2, 8, 2), (), 1.0, ((1, 2), (3, 4))))
    assert around.tokens == (1, 50, 51, 7, 2, 8, 2, 52, 53, 54)
    assert [around.tokens[start:end] for start, end in around.texts] == [(7,), (8,)]
    assert around.label == 1.0
