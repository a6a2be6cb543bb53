"""The plan for a TPU: its arguments, how it reads programs, its verdict; and one real compilation."""

import importlib.util
import json
import math

import pytest

pytest.importorskip("flax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorstore")

from dst_optax import cli
from dst_optax.finetuning import compiled_program, tpu_plan
from dst_optax.finetuning.models import decoder
from dst_optax.finetuning.tpu_plan import GIB, Job

HLO = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%layer (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %gathered = f32[8,16]{1,0} all-gather(%x), dimensions={1}
  %reduced = (bf16[4]{0}, f32[2]{0}) all-reduce(%y, %z), to_apply=%add
}

%pass (p: (s32[], s32[16])) -> (s32[], s32[16]) {
  %counts = s32[16]{0} all-reduce(%c), to_apply=%add
  %more = s32[2]{0} fusion(%c), kind=kLoop, calls=%inner
}

%inner (p: s32[2]) -> s32[2] {
  ROOT %moved = s32[2]{0} collective-permute(%p)
}

%more_layers (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4]) while(%init), condition=%more_layers, body=%layer, \
backend_config={"known_trip_count":{"n":"24"}}
  %v = (s32[], s32[16]) while(%init2), condition=%more_layers, body=%pass
  ROOT %out = f32[8,4]{1,0} all-gather-start(%r), dimensions={0}
}
"""


def test_collectives_in_loops_of_known_length_count_as_often_as_they_run():
    found, pass_bytes = compiled_program.collectives(HLO)
    assert found == {
        "all-gather": (25, 24 * 512 + 128, 512),
        "all-reduce": (25, 24 * 16 + 64, 64),
        "collective-permute": (1, 8, 8),
    }
    assert pass_bytes == 64 + 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"topology": "v5e"}, "v5e:16x16"),
        ({"topology": "v7:2x2"}, "v4, v5e, v5p, v6e"),
        ({"model": "t5_2"}, "t5_1_1_xxl"),
        ({"fraction": 0.0}, "between 0 and 1"),
        ({"optimizer": "sgd"}, "adafactor, adamw"),
        ({"mesh": (4, 4)}, "has 8 chips"),
        ({"batch_size": 3}, "no multiple of the 2 chips"),
    ],
)
def test_bad_jobs_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Job(**{"model": "tiny", "topology": "v5e:2x4", **changes})


def test_meshes():
    assert Job("tiny", "v5e:4x8").mesh_shape == (4, 8)
    assert Job("tiny", "v5p:2x2x4").mesh_shape == (4, 4)
    assert Job("tiny", "v5e:4x8", mesh=(32, 1)).mesh_shape == (32, 1)


def report(**peaks):
    job = Job("tiny", "v5e:2x4")
    facts = {"arguments": 1, "temp": 1, "flops": 1e12, "sorts": 0, "compile_seconds": 2.0, "collectives": {}}
    found = {name: {**facts, "peak": peak, "pass_bytes": 0} for name, peak in peaks.items()}
    found["update"] |= {"seed": GIB, "pass_bytes": 4096}
    return {"job": {**vars(job)}, **found, "verdict": tpu_plan.verdict(job, found)}


def test_a_step_that_fits():
    made = report(full=10 * GIB, dst=11 * GIB + GIB // 20, update=GIB)
    assert made["verdict"]["fits"]
    assert made["verdict"]["left"] == 5 * GIB - GIB // 20
    text = tpu_plan.table(made)
    assert "fits: 4.95 GiB of 16.00 GiB a chip left." in text
    assert "DST adds 1.05 GiB to the peak, the seed's shard (1.00 GiB) +5.0%; it moves 4.0 KiB" in text


def test_a_step_that_does_not_fit():
    made = report(full=15 * GIB, dst=17 * GIB, update=GIB)
    assert not made["verdict"]["fits"]
    assert "does not fit: 1.00 GiB of 16.00 GiB a chip too much." in tpu_plan.table(made)


def test_a_step_that_the_compiler_refuses():
    made = report(full=15 * GIB, dst=17 * GIB, update=GIB)
    made["dst"] = {"refused": "RESOURCE_EXHAUSTED: 17.2G of 15.7G"}
    made["verdict"] = tpu_plan.verdict(Job(**made["job"]), {k: made[k] for k in tpu_plan.PROGRAMS})
    assert not made["verdict"]["fits"]
    text = tpu_plan.table(made)
    assert "dst: the compiler refuses: RESOURCE_EXHAUSTED" in text
    assert "does not fit into 16.00 GiB a chip." in text


def test_without_libtpu(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plan", "--model=tiny", "--topology=v5e:2x2"]) == 2
    assert "dst-optax[tpu,finetuning]" in capsys.readouterr().err


def compiled(capsys, model, topology):
    """What the command says of a tiny job, with what must hold of any."""
    settings = ["--batch_size=4", "--inputs=16", "--targets=8", "--json"]
    assert cli.main(["plan", f"--model={model}", f"--topology={topology}", *settings]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"]["fits"]
    update = found["update"]
    assert update["sorts"] == 0
    assert set(update["collectives"]) == {"all-reduce"}
    assert 0 < update["pass_bytes"] <= 64 * 1024
    assert 0 < update["seed"] < found["dst"]["arguments"]
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("tpu")
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra 'tpu' (libtpu)")
class TestWithLibtpu:
    @pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    def test_a_tiny_t5(self, capsys, topology):
        compiled(capsys, "tiny", topology)

    def test_a_tiny_decoder(self, capsys, tmp_path):
        pytest.importorskip("seqio")
        config = decoder.DecoderConfig("llama", 512, 96, 2, 9, 3, 32, 128, tie_embeddings=True)
        (tmp_path / "config.json").write_text(decoder.config_text(config))
        found = compiled(capsys, tmp_path, "v5e:2x2")
        shares = {path: 2 if path.endswith("/scale") else 4 for path in decoder.shapes(config)}
        shards = [math.prod(x) // shares[path] for path, x in decoder.shapes(config).items()]
        assert found["update"]["seed"] == 4 * sum(shards)
