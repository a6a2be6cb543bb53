"""On vLLM itself a subset makes the model that vLLM loads from the tuned checkpoint, and gives the seed back.

Needs vLLM, not jax: ``VLLM_PLUGINS=dst_subset VLLM_ENABLE_V1_MULTIPROCESSING=0 pytest --noconftest`` and this
file.
"""

import os

import numpy as np
import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is large; run by hand, see the head of this file")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if os.environ.get("VLLM_PLUGINS") != "dst_subset":
    pytest.skip("VLLM_PLUGINS is not dst_subset", allow_module_level=True)

from dst_optax.serving.vllm import SubsetLLM  # noqa: E402
from dst_optax.subset import Entries, Subset, SubsetError, fingerprint, models  # noqa: E402


def random_subset(seed, share=0.05):
    rng, leaves = np.random.default_rng(1), {}
    for name, x in seed.items():
        positions = np.flatnonzero(rng.random(x.size) < share)
        values = (np.asarray(x).reshape(-1)[positions].astype(np.float32) + 1).astype(x.dtype)
        leaves[name] = Entries(tuple(x.shape), positions, values, None, fingerprint(np.asarray(x)))
    return Subset(leaves)


def started(path):
    return vllm.LLM(
        str(path), dtype="bfloat16", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True,
        kv_cache_memory_bytes=2**26,
    )  # fmt: skip


def weights(llm):
    model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    return {
        n: p.detach().contiguous().view(torch.uint8).numpy().tobytes() for n, p in model.named_parameters()
    }


def test_packed_experts_are_refused_by_name(tmp_path):
    """On a CPU vLLM keeps the experts of a mixture in another order and the same shape."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=1003, hidden_size=128, intermediate_size=96, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "seed")
    everything = random_subset(models.open_model(tmp_path / "seed"))
    everything.save(tmp_path / "everything")
    others = {n: e.take(slice(0, 0)) if ".experts." in n else e for n, e in everything.items()}
    Subset(others).save(tmp_path / "others")
    llm = started(tmp_path / "seed")
    seed, subsets = weights(llm), SubsetLLM(llm)
    with pytest.raises(SubsetError, match=r"\.experts\..*an order of its own"):
        subsets.load("everything", tmp_path / "everything")
    subsets.load("others", tmp_path / "others")
    subsets.activate("others")
    assert weights(llm) != seed
    subsets.deactivate()
    assert weights(llm) == seed


CONFIGS = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_model_is_that_of_the_tuned_checkpoint(family, tmp_path):
    kind, kwargs = CONFIGS[family]
    config = getattr(transformers, kind)(
        vocab_size=1003, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        **kwargs,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "seed")
    found = random_subset(models.open_model(tmp_path / "seed"))
    found.save(tmp_path / "subset")
    models.apply_to_files(found, tmp_path / "seed", tmp_path / "tuned")
    wanted = weights(started(tmp_path / "tuned"))
    llm = started(tmp_path / "seed")
    seed = weights(llm)
    subsets = SubsetLLM(llm)
    subsets.load("x", tmp_path / "subset")
    subsets.activate("x")
    assert weights(llm) == wanted != seed
    subsets.deactivate()
    assert weights(llm) == seed
    with pytest.raises(SubsetError, match="'y' is loaded"):
        subsets.activate("y")
    subsets.activate("x")
    llm.collective_rpc("reload_weights")  # the seed's, under the subset's name
    with pytest.raises(SubsetError, match="other values than the active subset 'x'"):
        subsets.activate("x")
    subsets = SubsetLLM(llm := started(tmp_path / "seed"))
    subsets.load("x", tmp_path / "subset")
    content = (tmp_path / "subset" / "subset.safetensors").read_bytes()
    (tmp_path / "subset" / "subset.safetensors").write_bytes(content[:-1])
    with pytest.raises(SubsetError):
        subsets.load("cut", tmp_path / "subset")
    assert [x.name for x in subsets.list()] == ["x"]
    assert weights(llm) == seed
