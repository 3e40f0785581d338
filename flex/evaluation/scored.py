"""What a task is given to score with: a model, its encoder, and whom to tell how far it is."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from flex.config import EvaluateSettings
from flex.data.examples import Encoder
from flex.evaluation.score import Prepare

Say = Callable[[str, int, int], None]  # what, how many are done, of how many


@dataclass(frozen=True)
class Scored:
    """`prepare` looks at each batch of prompts first, for a method that asks for it; `say` hears of the progress."""

    model: nn.Module
    encoder: Encoder
    settings: EvaluateSettings
    prepare: Prepare | None = None
    say: Say = lambda what, done, total: None

    @property
    def positions(self) -> int:
        """How many tokens the model takes; a large number where its configuration does not say."""
        config = getattr(self.model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        return int(getattr(config, "max_position_embeddings", None) or 1 << 20)
