"""The seal of a reply: another round, another start and changed tensors are refused, whoever carried them."""

import numpy as np
import pytest
from toy import CLIENTS, START, make_toy_app, strategy_of

from flex.errors import FlexError
from flex.federation.flower import ConfigRecord, RecordDict
from flex.federation.local import InProcessGrid
from flex.federation.messages import ARRAYS, to_arrays, to_record
from flex.federation.rounds import ClientFailed, run_rounds
from flex.federation.seal import SEAL


class Meddling(InProcessGrid):
    """Changes the reply of one client in one round, as a relay or a client could."""

    def __init__(self, app, meddle, from_round=2):
        super().__init__(app, CLIENTS)
        self.meddle, self.from_round, self.kept = meddle, from_round, {}

    def _deliver(self, message):
        reply = super()._deliver(message)
        config = message.content.config_records.get("config", {})
        if self.clients[message.metadata.dst_node_id] != "ben" or "server-round" not in config:
            return reply
        if config["server-round"] >= self.from_round:
            self.meddle(self, reply)
        self.kept.setdefault(config["server-round"], reply.content)
        return reply


def change_a_bit(grid, reply):
    arrays = to_arrays(reply.content[ARRAYS])
    arrays["w"][0] = np.nextafter(arrays["w"][0], np.float32(9))
    reply.content[ARRAYS] = to_record(arrays)


def last_rounds_again(grid, reply):
    reply.content = RecordDict(dict(grid.kept[1].items()))


def claim_another_start(grid, reply):
    reply.content[SEAL] = ConfigRecord({**reply.content[SEAL], "start": "0" * 64})


def take_the_seal_off(grid, reply):
    del reply.content[SEAL]


@pytest.mark.parametrize(
    ("meddle", "sentence"),
    [
        (change_a_bit, "client 'ben' sent tensors that are not those it made .* changed on the way"),
        (last_rounds_again, "client 'ben' sent a reply to round 1 in round 2; expected one to what it was asked"),
        (claim_another_start, "client 'ben' sent a reply that starts from other tensors .0{12}. than it was sent"),
        (take_the_seal_off, "client 'ben' sent a reply without a seal"),
    ],
)
def test_a_reply_that_does_not_fit_is_refused(tmp_path, meddle, sentence):
    grid = Meddling(make_toy_app(tmp_path), meddle)
    with pytest.raises((FlexError, ClientFailed), match=sentence):
        run_rounds(strategy_of("fedavg"), grid, START, 2)


def test_an_answer_without_content_has_no_seal(tmp_path):
    app = make_toy_app(tmp_path, fail="ben", error=FlexError("the disk is full"))
    with pytest.raises(FlexError, match="the disk is full"):
        run_rounds(strategy_of("fedavg"), InProcessGrid(app, CLIENTS), START, 1)
