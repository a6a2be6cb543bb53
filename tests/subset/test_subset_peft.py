"""SHiRA adapters load with peft and give the merged model's outputs."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner

from dst_optax import subset
from dst_optax.subset import SubsetError
from dst_optax.subset.peft import NOT_LINEAR, save_shira
from dst_optax.subset_cli import app

SHAPES = {"one.weight": (32, 24), "two.inner.weight": (16, 32), "one.bias": (32,), "embed.weight": (40, 24)}


def pair(change=("one.weight", "two.inner.weight"), share=0.05):
    rng = np.random.default_rng(0)
    seed = {p: rng.normal(size=s).astype(np.float32) for p, s in SHAPES.items()}
    tuned = {p: np.where(rng.random(x.shape) < share * (p in change), x + 1, x) for p, x in seed.items()}
    tuned = {p: x.astype(np.float32) for p, x in tuned.items()}
    return seed, tuned, subset.from_models(seed, tuned, with_seed_values=True)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda: pair(("one.bias",), 1.0)[2], "'one.bias' of shape"),
        (lambda: pair(("embed.weight",))[2], "'embed.weight' of shape"),
        (lambda: pair(share=0)[2], "empty"),
        (lambda: pair(share=1)[2], "Merge"),
        (lambda: subset.from_models(*pair()[:2]), "with_seed_values"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(found, message, tmp_path):
    with pytest.raises(SubsetError, match=message):
        save_shira(found(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_of_another_kind_is_not_overwritten(tmp_path):
    found = pair()[2]
    save_shira(found, tmp_path)
    save_shira(found, tmp_path)  # its own kind is replaced
    for content in ('{"peft_type": "LORA"}', "[]", "{"):
        (tmp_path / "adapter_config.json").write_text(content)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"LoRA")
        with pytest.raises(SubsetError, match=rf"{tmp_path} holds an adapter of the kind '(LORA|unknown)'"):
            save_shira(found, tmp_path)
        assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"LoRA"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "gs://bucket/y"], "gs://bucket/y lies in an object store"),
        (["--out", "adapter", "--not-linear", "("], "not_linear: '(' is no regular expression"),
    ],
)
def test_what_an_export_cannot_be_given(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    pair()[2].save(tmp_path / "subset")
    result = CliRunner().invoke(app, ["export-peft", "subset", *arguments, "--json"])
    assert result.exit_code == 1
    assert message in json.loads(result.output)["error"]
    assert [f.name for f in tmp_path.iterdir()] == ["subset"]


@pytest.mark.parametrize(
    "name",
    [
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "transformer.h.0.attn.c_attn.weight",
        "model.layers.0.mlp.gate.weight",
    ],
)
def test_matrices_of_other_layers_are_refused(name, tmp_path):
    seed = {"one.weight": np.zeros((8, 8), np.float32), name: np.zeros((8, 8), np.float32)}
    tuned = {p: np.eye(8, dtype=np.float32) for p in seed}
    with pytest.raises(SubsetError, match=f"'{name}' of shape"):
        save_shira(subset.from_models(seed, tuned, with_seed_values=True), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["T5", "GPT2", "Llama", "Mixtral", "GPTNeoX"])
def test_the_names_tell_the_linear_layers_of_transformers(kind):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    more = {
        "T5": {"d_ff": 24, "d_kv": 8},
        "GPT2": {"n_positions": 8, "add_cross_attention": True},
        "Mixtral": {"num_key_value_heads": 2, "num_local_experts": 2, "intermediate_size": 24},
    }
    config = getattr(transformers, f"{kind}Config")(**sizes, **more.get(kind, {"intermediate_size": 24}))
    suffix = {"T5": "ForConditionalGeneration", "GPT2": "LMHeadModel"}.get(kind, "ForCausalLM")
    model = getattr(transformers, f"{kind}{suffix}")(config)
    matrices = [n for n, p in model.named_parameters() if p.ndim == 2 and n.endswith(".weight")]
    for name in matrices:
        linear = isinstance(model.get_submodule(name.removesuffix(".weight")), torch.nn.Linear)
        assert (re.search(NOT_LINEAR, name) is None) == linear, name
    assert len(matrices) > 3


@pytest.mark.parametrize("share", [0.002, 0.1, 0.4])
def test_the_adapter_holds_the_differences(tmp_path, share):
    seed, tuned, found = pair(share=share)
    save_shira(found, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    rank = json.loads((tmp_path / "adapter_config.json").read_text())["r"]
    filled = [path for path, e in found.items() if len(e)]
    assert len(tensors) == 2 * len(filled) > 0
    for path in filled:
        name = f"base_model.model.{path.removesuffix('.weight')}"
        delta = np.zeros(SHAPES[path], np.float32)
        np.add.at(delta, tuple(tensors[f"{name}.shira_indices"]), tensors[f"{name}.shira_weight"])
        assert (delta == tuned[path] - seed[path]).all()
        assert tensors[f"{name}.shira_weight"].shape == (rank * sum(SHAPES[path]),)


def test_the_command_line_exports(tmp_path):
    found = pair()[2]
    found.save(tmp_path / "subset")
    save_shira(found, tmp_path / "expected", "toy")
    arguments = ["export-peft", tmp_path / "subset", "--out", tmp_path / "adapter", "--base-model", "toy"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["entries"] == found.count
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    again = CliRunner().invoke(app, [*map(str, arguments[:-2]), "--not-linear", "one"])
    assert again.exit_code == 1
    assert "'one.weight'" in again.output


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch and peft warn of themselves
@pytest.mark.parametrize("share", [0.002, 0.1, 0.4])
def test_peft_gives_the_merged_outputs(tmp_path, share):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(32, 16, bias=False)

        def forward(self, x):
            return self.inner(x)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(40, 24)
            self.one = torch.nn.Linear(24, 32)
            self.two = Inner()

        def forward(self, x):
            return self.two(torch.relu(self.one(self.embed(x))))

    def network(weights):
        net = Net()
        net.load_state_dict({p: torch.from_numpy(x.copy()) for p, x in weights.items()})
        return net

    seed, tuned, found = pair(share=share)
    save_shira(found, tmp_path)
    x = torch.arange(40)[None]
    adapted = peft.PeftModel.from_pretrained(network(seed), tmp_path)
    with torch.no_grad():
        got, expected, before = adapted(x), network(tuned)(x), network(seed)(x)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3)
    merged = adapted.merge_and_unload().state_dict()
    assert all(np.allclose(merged[p].numpy(), tuned[p], rtol=1e-6, atol=1e-6) for p in tuned)
