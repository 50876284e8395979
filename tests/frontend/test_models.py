"""Small models of transformers with random weights, against eager: logits, tokens, training, shapes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")

from castile.frontend.backend import Compiled, Options, backend  # noqa: E402

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "vocab_size": 100}
LLAMA = {**SMALL, "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 128}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# Model -> class of configuration, class of model, what the configuration says; how many attentions it has.
MODELS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**LLAMA, **ENDS}, 2),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**LLAMA, **ENDS, "sliding_window": 8}, 2),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**LLAMA, **ENDS, "head_dim": 16, "sliding_window": 8, "attn_implementation": "eager"},
        2,
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**GPT, **ENDS}, 2),
    "bert": ("BertConfig", "BertModel", {**SMALL, "intermediate_size": 128}, 2),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100},
        6,
    ),
    "vit": ("ViTConfig", "ViTModel", {**SMALL, "intermediate_size": 128, "image_size": 32, "patch_size": 8}, 2),
}
QUICK = ("llama",)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)


def made(name: str) -> Any:
    config, model, given, _ = MODELS[name]
    if name == "vit":
        given = {k: v for k, v in given.items() if k != "vocab_size"}
    return getattr(transformers, model)(getattr(transformers, config)(**given)).eval()


def inputs(name: str) -> dict[str, Any]:
    tokens = torch.randint(3, 100, (2, 17))
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    return {"input_ids": tokens, **({"decoder_input_ids": tokens[:, :9]} if name == "t5" else {})}


def first(output: Any) -> Any:
    return output.logits if "logits" in output else output.last_hidden_state


def compiled(f: Any, seen: list[Compiled], dynamic: bool | None = None) -> Callable[..., Any]:
    return torch.compile(f, backend=backend(Options(when="always"), seen.append), dynamic=dynamic)


def attentions(graph: Compiled) -> int:
    return sum(r.kind == "attention" and r.chosen for r in graph.partition.regions)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_logits_are_eagers_and_every_attention_is_one_kernel(name: str) -> None:
    model, given = made(name), inputs(name)
    seen: list[Compiled] = []
    run = compiled(model, seen)
    with torch.no_grad():
        mine, theirs = [first(run(**given)) for _ in range(2)], first(model(**given))
    for logits in mine:
        torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-4)
    assert sum(map(attentions, seen)) == MODELS[name][3]


@pytest.mark.slow
def test_one_compilation_serves_all_lengths() -> None:
    model = made("llama")
    seen: list[Compiled] = []
    run = compiled(model, seen, dynamic=True)
    with torch.no_grad():
        for n in (7, 12, 5, 33):
            x = torch.randint(3, 100, (2, n))
            torch.testing.assert_close(run(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)
    assert len(seen) == 1


@pytest.mark.slow
def test_generate_gives_eagers_tokens() -> None:
    model = made("llama")
    x = torch.randint(3, 100, (1, 7))
    theirs = model.generate(x, max_new_tokens=12, do_sample=False)
    seen: list[Compiled] = []
    model.forward = compiled(model.forward, seen, dynamic=True)
    assert model.generate(x, max_new_tokens=12, do_sample=False).tolist() == theirs.tolist()
    assert len(seen) <= 2


def curve(steps: int, how: Callable[[Any], Any]) -> list[float]:
    torch.manual_seed(0)
    config = transformers.GPT2Config(**GPT, **ENDS, **NO_DROPOUT)
    model = transformers.GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = torch.randint(3, 100, (4, 32))
    run, losses = how(model), []
    for _ in range(steps):
        loss = run(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("steps", [pytest.param(100, marks=pytest.mark.slow)])
def test_training_follows_eagers_loss(steps: int) -> None:
    seen: list[Compiled] = []
    theirs = curve(steps, lambda model: model)
    mine = curve(steps, lambda model: compiled(model, seen))
    assert mine == pytest.approx(theirs, abs=1e-3)
    assert theirs[-1] < theirs[0]
    assert sum(map(attentions, seen)) == 4, "two layers, forward and backward"


def test_a_sample_of_opinfo() -> None:
    sys.path.insert(0, str(__import__("pathlib").Path(__file__).parent))
    try:
        import opinfo
    finally:
        sys.path.pop(0)
    names = ["std", "tril", "cumsum", "nn.functional.nll_loss"]
    found = {name: opinfo.verdict(op, sample) for name, op, sample in opinfo.cases(names)}
    assert {name: why for name, (word, why) in found.items() if word == "fails"} == {}
    assert sum(word == "passes" for word, _ in found.values()) >= len(names)
