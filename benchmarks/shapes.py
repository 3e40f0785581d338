"""One table of the shapes that are measured, each with its reason."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """An MoE layer with a graft as wide as an expert."""

    name: str
    num_tokens: int
    hidden_size: int
    num_experts: int
    top_k: int
    intermediate_size: int
    reason: str

    @property
    def forward_flops(self) -> int:
        """Useful ones: three matrices for each of a token's experts and for the graft."""
        return 6 * self.num_tokens * (self.top_k + 1) * self.hidden_size * self.intermediate_size

    @property
    def training_flops(self) -> int:
        """Forward, the gradient of every activation, and the graft's weight gradients; none of the experts'."""
        weight_gradients = 6 * self.num_tokens * self.hidden_size * self.intermediate_size
        return 2 * self.forward_flops + weight_gradients


def parse(text: str) -> Shape:
    """A shape by its name in `SHAPES`, or "T,H,E,K,I": tokens, hidden size, experts, experts a token, expert width.

    Raises:
        ValueError: it is neither.
    """
    named = {shape.name: shape for shape in SHAPES}
    if text in named:
        return named[text]
    sizes = [int(size) if size.isdecimal() else 0 for size in text.split(",")]
    if len(sizes) != 5 or min(sizes) < 1 or sizes[3] > sizes[2]:
        raise ValueError(
            f"SHAPE={text}: expected T,H,E,K,I (tokens, hidden size, experts, experts a token, expert width: five "
            f"whole numbers above 0, K at most E) or one of {', '.join(named)}"
        )
    return Shape(text, *sizes, "picked")


SHAPES = (
    Shape("demo", 400, 128, 16, 2, 96, "a step of `make demo`"),
    Shape("mid-256", 256, 512, 16, 2, 1024, "32 rows an expert: packing the weights counts"),
    Shape("mid-2048", 2048, 512, 16, 2, 1024, "256 rows an expert: near the dense matmul"),
    Shape("mid-8192", 8192, 512, 16, 2, 1024, "activations larger than any cache"),
    Shape("qwen1.5-moe", 512, 2048, 60, 4, 1408, "a layer of a real model: 2 GB of fp32 weights, 34 rows an expert"),
    Shape("qwen1.5-decode", 1, 2048, 60, 4, 1408, "generating: reading the weights is all there is to do"),
)
SCORED = tuple(shape for shape in SHAPES if shape.num_tokens > 1)  # a calibration batch is never one token
# What CI runs once, unmeasured, so that the benches keep working.
SMALL = (
    Shape("small", 70, 32, 6, 2, 24, "every path in no time"),
    Shape("small-odd", 9, 40, 4, 3, 24, "fewer rows than a tile; grouped_mm wants rows of 16 bytes"),
)
# The five models of the design: H, E, K, I. The tokens are put in where one is measured.
MODELS = (
    Shape("Qwen1.5-MoE-A2.7B", 0, 2048, 60, 4, 1408, "60 narrow experts and a shared one"),
    Shape("DeepSeek-MoE-16B", 0, 2048, 64, 6, 1408, "more rows an expert"),
    Shape("OLMoE-1B-7B", 0, 2048, 64, 8, 1024, "top-8, narrower"),
    Shape("Mixtral-8x7B", 0, 4096, 8, 2, 14336, "few wide experts: near the dense matmul"),
    Shape("Qwen3-30B-A3B", 0, 2048, 128, 8, 768, "many narrow experts: rows an expert are few"),
)
TOKENS = (8192, 2048, 32768)  # the most telling first
SMALL_TOKENS = (1, 16, 128)
TINY_MODELS = (Shape("tiny", 0, 32, 6, 2, 24, "every line of the bench in no time"),)
