"""Small transformers of random weights through torch.compile: castile beside eager and Inductor, one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from castile.benchmarks._command import Options, main, wanted
from castile.benchmarks.harness import Candidate, Case

# What logits in f32 may differ from eager's by; those in bf16 may be so many times as far from eager's in f32 as
# eager's own in bf16 are.
TOLERANCE, ROUNDING = 1e-4, 2.0

# Tokens and dtypes of the cases.
SIZES = ((128, "f32"), (512, "f32"), (512, "bf16"), (2048, "f32"), (2048, "bf16"))
LONGEST = 2048

LAYERS, VOCABULARY, WIDTH, HEADS, BATCH, WINDOW, PATCH = 4, 2048, 512, 8, 1, 256, 16
COMMON = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
WORDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}
DECODER = {**COMMON, **WORDS, "intermediate_size": 1408, "num_key_value_heads": 4}


@dataclass(frozen=True, slots=True)
class Model:
    """The classes of a model and of its configuration, what the configuration says, and what the model reads."""

    config: str
    model: str
    given: Mapping[str, Any]
    reads: tuple[str, ...] = field(default=("input_ids",))


MODELS = {
    "llama": Model("LlamaConfig", "LlamaForCausalLM", DECODER),
    "mistral": Model("MistralConfig", "MistralForCausalLM", {**DECODER, "sliding_window": WINDOW}),
    # transformers' own attention for Gemma-2: the others leave its softcap out
    "gemma2": Model(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**DECODER, "head_dim": WIDTH // HEADS, "sliding_window": WINDOW, "attn_implementation": "eager"},
    ),
    "gpt2": Model(
        "GPT2Config",
        "GPT2LMHeadModel",
        {**WORDS, "n_positions": LONGEST, "n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS},
    ),
    "bert": Model(
        "BertConfig",
        "BertModel",
        {**COMMON, **WORDS, "max_position_embeddings": LONGEST, "intermediate_size": 4 * WIDTH},
    ),
    "t5": Model(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            **WORDS,
            "d_model": WIDTH,
            "d_kv": WIDTH // HEADS,
            "d_ff": 4 * WIDTH,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "decoder_start_token_id": 0,
        },
        ("input_ids", "decoder_input_ids"),
    ),
    "vit": Model("ViTConfig", "ViTModel", {**COMMON, "intermediate_size": 4 * WIDTH}, ("pixel_values",)),
}


def made(name: str, tokens: int) -> Any:
    """A model in evaluation mode, the same at each call; an image is as large as gives so many patches."""
    import torch
    import transformers

    torch.manual_seed(0)
    size = {"image_size": (8 * PATCH, tokens // 8 * PATCH), "patch_size": PATCH} if name == "vit" else {}
    config = getattr(transformers, MODELS[name].config)(**MODELS[name].given, **size)
    return getattr(transformers, MODELS[name].model)(config).eval()


def inputs(name: str, tokens: int, rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
    """What a model reads: words, or an image in its own dtype."""
    import torch

    if name == "vit":
        pixels = rng.standard_normal((BATCH, 3, 8 * PATCH, tokens // 8 * PATCH), dtype=np.float32)
        return {"pixel_values": torch.from_numpy(pixels).to(dtype)}
    return {word: torch.from_numpy(rng.integers(3, VOCABULARY, (BATCH, tokens))) for word in MODELS[name].reads}


def case(name: str, tokens: int, dtype: str) -> Case[Any]:
    """A forward pass of a model over some tokens."""
    import torch

    torch._dynamo.reset()  # another case of the same model would make its sizes dynamic
    plain = made(name, tokens)
    model = plain if dtype == "f32" else made(name, tokens).to(torch.bfloat16)

    def forward(run: Callable[..., Any]) -> Callable[[Any], Callable[[], object]]:
        def prepare(x: Any) -> Callable[[], object]:
            def call() -> object:
                with torch.no_grad():
                    return run(**x)[0]

            return call

        return prepare

    def check(x: Any, output: object) -> None:
        with torch.no_grad():
            theirs = model(**x)[0]
            if dtype == "f32":
                torch.testing.assert_close(output, theirs, rtol=TOLERANCE, atol=TOLERANCE)
                return
            exact = plain(**{k: v.float() if v.is_floating_point() else v for k, v in x.items()})[0]
        assert isinstance(output, torch.Tensor)
        mine, allowed = (float((y.float() - exact).norm()) for y in (output, theirs))
        if not mine <= ROUNDING * allowed:
            raise AssertionError(f"{mine:.3g} from the logits in f32, where eager is {allowed:.3g} from them")

    weights = sum(p.numel() for p in model.parameters())
    candidates = (
        Candidate("castile", forward(torch.compile(model, backend="castile")), allocates=True),
        Candidate("eager", forward(model), allocates=True),
        Candidate("inductor", forward(torch.compile(model)), allocates=True),
    )
    flops = 2.0 * weights * tokens * BATCH
    size = float(weights * model.dtype.itemsize)
    return Case(
        title(name, tokens, dtype),
        lambda rng: inputs(name, tokens, rng, model.dtype),
        candidates,
        "eager",
        check,
        flops,
        size,
        cache="in",
    )


def title(name: str, tokens: int, dtype: str) -> str:
    return f"{name} {tokens} tokens {dtype}"


def cases(options: Options) -> Iterator[Case[Any]]:
    """The cases, each built when its turn comes."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    sizes = ((64, "f32"),) if options.quick else SIZES
    for name in MODELS:
        for tokens, dtype in sizes:
            if wanted(title(name, tokens, dtype), options.only):
                yield case(name, tokens, dtype)


if __name__ == "__main__":
    raise SystemExit(main("models", cases))
