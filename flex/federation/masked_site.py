"""Secure aggregation, a site's half: what it keeps between the four messages of a round, and what it answers.

What a site keeps (its change, its keys, the shares it made and got) lies in its own folder, since under Flower's engine
every message may find a new process. It is deleted with its last answer. The order of the questions is the site's to
hold: a server that asked one twice, or for both secrets of one site, could take a mask off a single update.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flex.errors import FlexError, require
from flex.federation.flower import ConfigRecord, secagg
from flex.federation.masking import (
    COLLECT,
    FEWEST,
    SHARES,
    UNMASK,
    add_mask,
    check_range,
    encode,
    sign_of_pair,
    threshold_of,
)
from flex.federation.messages import Arrays
from flex.store.files import load_tensors, save_tensors

FILE = "masked-round.safetensors"
NEXT = {SHARES: COLLECT, COLLECT: UNMASK, UNMASK: ""}


class MaskedSite:
    """One site's part in the secure aggregation of one round.

    Args:
        folder: the site's own.
        client_id: for sentences.
    """

    def __init__(self, folder: Path, client_id: str):
        self.path, self.sender = folder / FILE, f"client {client_id!r}"

    def begin(self, round_index: int, asked: Mapping[str, Any], change: Arrays) -> ConfigRecord:
        """Keeps the change of a turn that is done; returns the site's public keys.

        Args:
            asked: `number` (the site's own), `sites` and `threshold`, as the server says.

        Raises:
            FlexError: with such numbers the sum would show a single update.
        """
        number, sites, threshold = (int(asked[name]) for name in ("number", "sites", "threshold"))
        require(sites >= FEWEST, f"{self.sender} was asked to hide among {sites} sites; expected {FEWEST} or more")
        require(
            threshold_of(sites) <= threshold <= sites,
            f"{self.sender} was asked for shares of which {threshold} of {sites} open a secret; expected over half",
        )
        flower = secagg()
        state, key = flower.State(), flower.Key
        state.nid = number
        keys = flower.setup(
            state,
            {
                key.SAMPLE_NUMBER: sites,
                key.SHARE_NUMBER: sites,
                key.THRESHOLD: threshold,
                key.CLIPPING_RANGE: 1.0,  # Flower's own numbers under the mask, which are not used
                key.TARGET_RANGE: 2,
                key.MOD_RANGE: 2**32,
                key.MAX_WEIGHT: 1.0,
            },
        )
        self._keep(round_index, SHARES, state, change)
        return ConfigRecord(keys)

    def answer(self, round_index: int, stage: str, asked: Mapping[str, Any]) -> tuple[ConfigRecord, Arrays]:
        """(record, masked numbers) that answer one of the questions after the turn.

        Raises:
            FlexError: it is not the next question of this round, or one that would show more than the sum.
        """
        state, change = self._kept(round_index, stage)
        try:
            record, numbers = getattr(self, f"_{stage}")(state, change, asked)
        except (KeyError, TypeError, ValueError, IndexError) as error:  # Flower's functions, of what the server sent
            raise FlexError(f"{self.sender} cannot answer {stage!r} in round {round_index}: {error}") from None
        if NEXT[stage]:
            self._keep(round_index, NEXT[stage], state, change if stage == SHARES else {})
        else:
            self.path.unlink(missing_ok=True)
        return ConfigRecord(record), numbers

    def _shares(self, state: Any, change: Arrays, asked: Mapping[str, Any]) -> tuple[dict, Arrays]:
        return secagg().share_keys(state, {name: tuple(keys) for name, keys in asked.items()}), {}

    def _mask(self, state: Any, change: Arrays, asked: Mapping[str, Any]) -> tuple[dict, Arrays]:
        flower, key = secagg(), secagg().Key
        sources = [int(source) for source in asked[key.SOURCE_LIST]]
        require(len(set(sources)) == len(sources), f"{self.sender} was given two shares of one site; expected one each")
        limit, levels = float(asked["range"]), int(asked["levels"])
        check_range(change, limit, levels, state.sample_num)
        shares = {key.CIPHERTEXT_LIST: list(asked[key.CIPHERTEXT_LIST]), key.SOURCE_LIST: sources}
        flower.collect(state, shares, 1, flower.no_tensors)  # opens and checks the shares; there is nothing to mask
        numbers = {name: encode(array, limit, levels) for name, array in change.items()}
        add_mask(numbers, state.rd_seed, 1)
        for other in sources:
            pair = flower.pair_key(state.sk1, state.public_keys_dict[other][0])
            add_mask(numbers, pair, sign_of_pair(state.nid, other))
        return {}, numbers

    def _unmask(self, state: Any, change: Arrays, asked: Mapping[str, Any]) -> tuple[dict, Arrays]:
        key = secagg().Key
        active, dead = (
            {int(n) for n in asked.get(name, [])} for name in (key.ACTIVE_NODE_ID_LIST, key.DEAD_NODE_ID_LIST)
        )
        require(
            not active & dead and state.nid in active and active | dead == set(state.rd_seed_share_dict),
            f"{self.sender} was asked to unmask {sorted(active)} and {sorted(dead)}; expected every site that it "
            "shares with in one of the two, and itself in the first",
        )
        lists = {key.ACTIVE_NODE_ID_LIST: sorted(active), key.DEAD_NODE_ID_LIST: sorted(dead)}
        return secagg().unmask(state, lists), {}

    def _keep(self, round_index: int, stage: str, state: Any, change: Arrays) -> None:
        values = {name: _to_json(value) for name, value in copy.deepcopy(state).to_dict().items()}
        header = {"kind": "masked", "round": round_index, "next": stage, "state": json.dumps(values)}
        save_tensors(self.path, {name: torch.from_numpy(array) for name, array in change.items()}, header)

    def _kept(self, round_index: int, stage: str) -> tuple[Any, Arrays]:
        require(
            self.path.exists(),
            f"{self.sender} was asked {stage!r} in round {round_index}; expected a masked turn first",
        )
        tensors, header = load_tensors(self.path)
        if (header["round"], header["next"]) != (round_index, stage):
            raise FlexError(
                f"{self.sender} was asked {stage!r} in round {round_index}; expected {header['next']!r} in round "
                f"{header['round']}"
            )
        values = {name: _from_json(value) for name, value in json.loads(header["state"]).items()}
        return secagg().State(**values), {name: tensor.numpy().copy() for name, tensor in tensors.items()}


def _to_json(value: Any) -> Any:
    """Bytes as hexadecimal text, beside what they are: JSON has none."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    return [_to_json(one) for one in value] if isinstance(value, list | tuple) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return bytes.fromhex(value["hex"])
    return [_from_json(one) for one in value] if isinstance(value, list) else value
