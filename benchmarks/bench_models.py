"""Small transformers of random weights through torch.compile: castile beside eager and Inductor, one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from castile.benchmarks._command import Options, main, wanted
from castile.benchmarks.harness import Candidate, Case

# Logits may differ from eager's by this much.
TOLERANCE = 1e-4

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 512, "n_head": 8, "n_layer": 4}),
    "bert": ("BertConfig", "BertModel", {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}),
}
LAYERS, VOCABULARY, BATCH = 4, 2048, 1


def made(name: str) -> Any:
    """A model in evaluation mode, the same at each call."""
    import torch
    import transformers

    config, model, given = MODELS[name]
    layers = {} if name == "gpt2" else {"num_hidden_layers": LAYERS}
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCABULARY, "use_cache": False}
    return getattr(transformers, model)(getattr(transformers, config)(**given, **layers, **ends)).eval()


def case(name: str, tokens: int) -> Case[Any]:
    """A forward pass of a model over some tokens."""
    import torch

    model = made(name)

    def inputs(rng: np.random.Generator) -> Any:
        return torch.from_numpy(rng.integers(3, VOCABULARY, (BATCH, tokens)))

    def forward(run: Callable[..., Any]) -> Callable[[Any], Callable[[], object]]:
        def prepare(x: Any) -> Callable[[], object]:
            def call() -> object:
                with torch.no_grad():
                    return run(x)[0]

            return call

        return prepare

    def check(x: Any, output: object) -> None:
        with torch.no_grad():
            torch.testing.assert_close(output, model(x)[0], rtol=TOLERANCE, atol=TOLERANCE)

    weights = sum(p.numel() for p in model.parameters())
    candidates = (
        Candidate("castile", forward(torch.compile(model, backend="castile")), allocates=True),
        Candidate("eager", forward(model), allocates=True),
        Candidate("inductor", forward(torch.compile(model)), allocates=True),
    )
    flops = 2.0 * weights * tokens * BATCH
    return Case(f"{name} {tokens} tokens", inputs, candidates, "eager", check, flops, 4.0 * weights, cache="in")


def cases(options: Options) -> Iterator[Case[Any]]:
    """The cases, each built when its turn comes."""
    import torch

    torch.set_num_threads(options.threads)
    for name in MODELS:
        for tokens in (64,) if options.quick else (128, 512):
            if wanted(f"{name} {tokens} tokens", options.only):
                yield case(name, tokens)


if __name__ == "__main__":
    raise SystemExit(main("models", cases))
