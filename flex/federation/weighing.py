"""FedDPA's weight for each input (arXiv 2403.19211): how much a client's own LoRA counts beside the averaged one.

    a = 1/2 mean_i cos(h(x), h(x_i)),  cut to [0, 1];  the client's own LoRA counts a, the averaged one 1 - a

h is the last hidden state of the prompt's last token under the client's own LoRA alone, x_i are a few of the client's
training prompts. An input like the client's own data weighs both alike, as in training; a foreign one goes by the
averaged LoRA.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flex.methods import SECOND_LORA
from flex.model.adapters import weigh, work_with
from flex.model.base import Base

ANCHORS = 5  # training prompts that an input is compared with, as in the paper's code
LARGEST = 0.5  # the weight of an input that is just like them, as in the paper's code


class Weighing:
    """Sets the weights of the two LoRAs for each batch of prompts.

    Args:
        own: prompts of the client, as tokens; none (a client whose data are not at hand): the weights of training.
    """

    def __init__(self, base: Base, own: Sequence[Sequence[int]], pad_id: int):
        self.base, self.pad_id = base, pad_id
        self.anchors = self._states(own) if own else None

    def __call__(self, prompts: Sequence[Sequence[int]]) -> None:
        if self.anchors is not None:
            weigh(self.base, self.share(self._states(prompts)))

    def share(self, states: Tensor) -> Tensor:
        """[B, H] -> [B]: a for each."""
        likeness = F.normalize(states, dim=-1) @ F.normalize(self.anchors, dim=-1).T
        return (LARGEST * likeness.mean(1)).clamp(0, 1)

    @torch.no_grad()
    def _states(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        device = self.base.device
        ends = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.full((len(prompts), int(ends.max())), self.pad_id)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        mask = (torch.arange(ids.shape[1]) < ends[:, None]).long()
        weigh(self.base, 1.0)
        work_with(self.base, (SECOND_LORA,))
        self.base.model.eval()
        try:
            output = self.base.model.base_model(  # the decoder: no logits are made
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            )
        finally:
            work_with(self.base, ())
            weigh(self.base, 0.5)
        return output.last_hidden_state[torch.arange(len(prompts)), ends.to(device) - 1].float()
