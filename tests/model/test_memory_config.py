"""A memory configuration that DeepSpeed refuses is the user's to mend."""

from __future__ import annotations

import json

import pytest

from tests.ranks import RankError
from tests.training import trained, write_job


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stage3_prefetch_bucket_sizee", 1, "Did you mean stage3_prefetch_bucket_size[?]"),
        ("stage3_prefetch_bucket_size", "many", "stage3_prefetch_bucket_size|prefetch"),
    ],
)
def test_a_mistake_names_its_key(key, value, message, gpt2_base, ranks2, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, key: value}}))
    with pytest.raises(RankError, match=f"JobError: memory.config: zero_optimization.{key}.*{message}|JobError: .*{message}"):
        trained(ranks2, write_job(tmp_path, gpt2_base), tmp_path / "run", f'memory.config="{file}"')
