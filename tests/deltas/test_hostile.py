"""Broken and hostile files: one clear line within seconds and bounded memory, whatever is in them.

The fuzz changes valid files at random, always in the same way, and lets every reader have them: only `JobError` may come out.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.deltas.foreign import read_foreign
from pipeline.deltas.merge import merge
from pipeline.deltas.mixture import mix
from pipeline.deltas.verify import verify
from pipeline.generate.served import read_deltas
from pipeline.job.errors import JobError
from pipeline.weights.delta import read_delta
from pipeline.weights.digest import sha256_of
from pipeline.weights.index import open_checkpoint, read_header
from tests.deltas.conftest import make_delta

CASES = 200
MEMORY_BYTES = 200_000_000


def refused(work, match: str = "") -> str:
    start = time.monotonic()
    with pytest.raises(JobError, match=match) as caught:
        work()
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def delta(deltas, tmp_path) -> Path:
    shutil.copytree(deltas["norms"], tmp_path / "delta")
    return tmp_path / "delta"


def change(delta: Path, **changes) -> None:
    manifest = json.loads((delta / "manifest.json").read_text())
    (delta / "manifest.json").write_text(json.dumps(manifest | changes))


def with_tensors(delta: Path, **changes) -> None:
    """Other tensors, and a manifest that agrees with the file."""
    file = delta / "adapter_model.safetensors"
    save_file(load_file(file) | changes, file)
    change(delta, sha256=sha256_of(file))


A = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(3, 32), r"lora_A.weight is torch.float32 of shape \[3, 32\], manifest.json says \[2, None\]"),
        (torch.zeros(2, 32, dtype=torch.int32), "is torch.int32"),
        (torch.zeros(2), "of shape"),
        (torch.full((2, 32), torch.nan), "o_proj.lora_A has a value that is not finite"),
        (torch.full((2, 32), torch.inf), "not finite"),
        (torch.zeros(2, 33), r"adapts tensor .* of shape \[32, 33\], which in .* is of shape \[32, 32\]"),
    ],
)
def test_tensors_that_are_not_those_of_the_manifest(tensor, match, delta, llama_base):
    with_tensors(delta, **{A: tensor})
    refused(lambda: mix(llama_base, [(delta, 1.0)]), match)


def test_nothing_is_generated_with_values_that_are_not_finite(delta):
    with_tensors(delta, **{A: torch.full((2, 32), torch.nan)})
    refused(lambda: read_deltas({None: delta}, ""), "not finite")


def lie(key: str, **changes):
    return lambda manifest: {key: [manifest[key][0] | changes, *manifest[key][1:]]}


@pytest.mark.parametrize(
    ("change_of", "match"),
    [
        (lambda _: {"sha256": "0" * 64}, "sha256 is not the manifest's"),
        (lambda _: {"parameters": 1}, "says that 1 were trained"),
        (lambda _: {"parameters": 1 << 60}, "were trained"),
        (lie("modules", tensor="model.layers.9.self_attn.o_proj.weight"), "is not there. Name the right base"),
        (lie("modules", tensor="../../etc/passwd"), "is not there"),
        (lie("modules", name="another"), "no base_model.model.another.lora_A.weight, though manifest.json names it"),
        (lie("modules", rank=0), "has rank 0"),
        (lie("modules", rank=-2), "has rank -2"),
        (lie("modules", rank=1 << 60), "manifest.json says"),
        (lie("modules", alpha=float("nan")), "alpha nan"),
        (lie("modules", alpha="4"), "modules.0.alpha: Input should be a valid number"),
        (lambda manifest: {"modules": manifest["modules"] * 2}, "twice"),
        (lambda _: {"base_digest": "0" * 64, "base_files": {}}, "Name the base that the delta was trained on"),
        (lambda _: {"base_digest": "0" * 64}, "base_files and base_digest are not of one base"),
        (lambda manifest: {"base_files": {f"../{name}": sha for name, sha in manifest["base_files"].items()}}, "are not of one base"),
        (lambda _: {"added": {"tokens": ["a"], "ids": [1 << 60], "rows": {"model.norm.weight": ["lm_head.weight"]}}}, "of shape"),
        (lambda _: {"added": {"tokens": ["a", "b"], "ids": [9, 3], "rows": {}}}, "ascending"),
    ],
)
def test_a_manifest_that_lies(change_of, match, delta, llama_base):
    change(delta, **change_of(json.loads((delta / "manifest.json").read_text())))
    refused(lambda: mix(llama_base, [(delta, 1.0)]), match)


def test_rows_of_tokens_that_leave_a_gap(llama_base, tmp_path):
    delta = make_delta(llama_base, tmp_path / "delta", tokens=("<a>", "<b>"))
    manifest = json.loads((delta / "manifest.json").read_text())
    change(delta, added=manifest["added"] | {"ids": [5, 1 << 50]})
    refused(lambda: mix(llama_base, [(delta, 1.0)]), "which has 320 rows")


def test_a_base_of_the_same_name_and_other_weights(llama_base, deltas, copied, tmp_path):
    file = sorted(copied.glob("*.safetensors"))[-1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(lambda: merge(copied, deltas["qv"], tmp_path / "out"), "its digest is .* the delta .* was trained on")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "a/b.safetensors", 7, ["x"], None])
def test_an_index_that_names_what_is_outside(name, copied):
    index = copied / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(value))
    refused(lambda: open_checkpoint(copied), "not a valid safetensors index")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", ".hidden", "", "a/b"])
@pytest.mark.parametrize("where", ["files", "beside"])
def test_a_certificate_that_names_what_is_outside(where, name, llama_base, deltas, tmp_path):
    merge(llama_base, deltas["qv"], tmp_path / "merged")
    file = tmp_path / "merged" / "merge.json"
    certificate = json.loads(file.read_text())
    certificate["result"][where][name] = "0" * 64
    certificate["running"][name] = []
    file.write_text(json.dumps(certificate))
    refused(lambda: verify(tmp_path / "merged"), "certificate is damaged")


def raw(file: Path, length: int, header: bytes, size: int) -> Path:
    """A file with this header that is said to be of this length, stretched to a size without taking room."""
    with file.open("wb") as stream:
        stream.write(length.to_bytes(8, "little") + header)
        stream.truncate(max(size, stream.tell()))
    return file


HUGE = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 16]}}).encode()
HEADERS = {
    "a header of 2^60 bytes": (1 << 60, b"{}", 0),
    "a header of 2^40 bytes in a file of that size": (1 << 40, b"{}", 1 << 41),
    "a shape of 2^80 elements": (len(HUGE), HUGE, len(HUGE) + 24),
    "a nested header": (200_000, b"[" * 200_000, 0),
    "a negative shape": (80, b'{"x":{"dtype":"F32","shape":[-2,-2],"data_offsets":[0,16]}}'.ljust(80), 104),
    "a fraction": (80, b'{"x":{"dtype":"F32","shape":[2.0,2],"data_offsets":[0,16]}}'.ljust(80), 104),
    "a list for a dtype": (80, b'{"x":{"dtype":["F32"],"shape":[4],"data_offsets":[0,16]}}'.ljust(80), 104),
    "a number of a million digits": (1_000_100, b'{"x":' + b"9" * 1_000_094 + b"}", 0),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_declares_what_is_not_there(case, copied, delta, tmp_path):
    file = raw(tmp_path / "x.safetensors", *HEADERS[case])
    refused(lambda: read_header(file), "corrupt|truncated|does not fit|cannot be read|not read here")
    shutil.copyfile(file, delta / "adapter_model.safetensors") if file.stat().st_size < 1 << 30 else file.replace(
        delta / "adapter_model.safetensors"
    )
    refused(lambda: read_delta(delta), "cannot be read")


def test_pickles_that_would_take_all_memory_or_time(tmp_path):
    file = tmp_path / "x.bin"
    torch.save({"q.lora_A": torch.zeros(1).expand(1 << 40), "q.lora_B": torch.zeros(2, 2)}, file)
    refused(lambda: read_foreign(file, 1.0), "not a table of tensors")
    torch.save({"q.lora_A": torch.zeros(1 << 20), "q.lora_B": torch.zeros(2, 2)}, file)
    with zipfile.ZipFile(file) as plain, zipfile.ZipFile(tmp_path / "packed.bin", "w", zipfile.ZIP_DEFLATED) as packed:
        for one in plain.infolist():
            packed.writestr(one.filename, plain.read(one), zipfile.ZIP_DEFLATED)
    refused(lambda: read_foreign(tmp_path / "packed.bin", 1.0), "a packed archive")
    file.write_bytes(pickle.dumps(Evil()))
    refused(lambda: read_foreign(file, 1.0), "Nothing else is unpickled")
    assert not Path("/tmp/zlora-was-here").exists()
    save_file({f"base_model.model.q.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}, tmp_path / "adapter_model.safetensors")
    for key in ("(a+)+", "(", "x" * 301, ".*" * 5, "a{1,99999999999}"):
        config = {"peft_type": "LORA", "lora_alpha": 4, "alpha_pattern": {key: 2}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        refused(lambda: read_foreign(tmp_path, None), "alpha_pattern")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/zlora-was-here",)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, cut out, doubled or replaced; or a number made another."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        # Most of what there is to break is at the beginning.
        place = rng.randrange(min(len(found), rng.choice((16, 400, len(found)))) or 1) if found else 0
        match rng.randrange(6):
            case 0 if found:
                found[place] ^= 1 << rng.randrange(8)
            case 1:
                del found[place : place + rng.choice((1, 8, 100))]
            case 2:
                found[place:place] = found[place : place + rng.choice((1, 8, 100))]
            case 3:
                found[place : place + 8] = rng.choice((b"\xff" * 8, b"\x00" * 8, (1 << rng.randrange(64)).to_bytes(8, "little")))
            case 4:
                del found[rng.randrange(len(found) + 1) :]
            case _:
                digits = [i for i, byte in enumerate(found[:4000]) if 48 <= byte <= 57]
                if digits:
                    place = rng.choice(digits)
                    found[place : place + 1] = rng.choice((b"-1", b"1e999", b"null", b'"x"', b"[]", b"{}", b"9" * 30, b"NaN", b"true"))
    return bytes(found)


def fuzz(work: Path) -> int:
    """Lets every reader have `CASES` changed copies of each file. Returns how many were refused."""
    rng, refusals = random.Random(20), 0
    base, delta, peft, loralib, merged = (work / name for name in ("base", "delta", "peft", "loralib.bin", "merged"))
    readers = {
        base / "model.safetensors.index.json": lambda: open_checkpoint(base),
        sorted(base.glob("*.safetensors"))[0]: lambda: open_checkpoint(base),
        delta / "manifest.json": lambda: mix(base, [(delta, 1.0)]),
        delta / "adapter_model.safetensors": lambda: mix(base, [(delta, 1.0)]),
        peft / "adapter_config.json": lambda: read_foreign(peft, None),
        peft / "adapter_model.safetensors": lambda: read_foreign(peft, None),
        loralib: lambda: read_foreign(loralib, 8.0),
        merged / "merge.json": lambda: verify(merged),
    }
    for file, read in readers.items():
        data = file.read_bytes()
        read()
        for number in range(CASES):
            changed = mutated(data, rng)
            file.write_bytes(changed)
            if file.name == "adapter_model.safetensors" and file.parent == delta:
                # So that the tensors are looked at too, not the digest alone.
                change(delta, sha256=sha256_of(file))
            try:
                read()
            except JobError as error:
                refusals += "\n" not in str(error)
            except Exception as error:
                raise AssertionError(f"{file.name}, case {number}: {type(error).__name__}: {error}") from error
        file.write_bytes(data)
        if file.parent == delta:
            change(delta, sha256=sha256_of(delta / "adapter_model.safetensors"))
    return refusals


def test_whatever_is_in_the_files_only_refusals_come_out(copied, deltas, tmp_path):
    """In a process of its own, whose memory is counted."""
    shutil.copytree(deltas["norms"], tmp_path / "delta")
    (tmp_path / "peft").mkdir()
    pair = {f"model.layers.0.self_attn.q_proj.lora_{part}": torch.randn(2, 2) for part in "AB"}
    save_file({f"base_model.model.{name}.weight": tensor for name, tensor in pair.items()}, tmp_path / "peft" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "lora_alpha": 4,
        "r": 2,
        "alpha_pattern": {"q_proj": 2},
        "use_rslora": True,
        "target_modules": ["q_proj"],
    }
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    torch.save(pair, tmp_path / "loralib.bin")
    merge(copied, tmp_path / "delta", tmp_path / "merged")
    script = "import sys; from pathlib import Path; from tests.deltas.test_hostile import measured; measured(Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2], timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, refusals = map(int, done.stdout.split()[-2:])
    assert refusals > 5 * CASES
    assert grown < MEMORY_BYTES


def measured(work: Path) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusals = fuzz(work)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024, refusals)
