"""`flex chat`: a conversation with one client's model, which is loaded once."""

import sys
from pathlib import Path

from transformers import TextStreamer

from flex.commands.saved import Saved, check_tokens, load_saved
from flex.errors import FlexError

NEW, QUIT = "/new", "/quit"
Turns = list[dict[str, str]]


def chat(folder: Path, method: str, seed: int | None, client_id: str, max_new_tokens: int) -> int:
    """Answers line by line, each token as it comes, with the conversation so far; ends with standard input."""
    check_tokens(max_new_tokens)
    saved = load_saved(folder, method, seed, with_data=False)
    saved.attach(client_id)
    asked = sys.stdin.isatty()
    if asked:
        print(f"{client_id}, {method}, after round {saved.round_index}. {NEW} begins anew, {QUIT} or Ctrl-D ends.")
    turns: Turns = []
    while (line := _line(asked)) is not None:
        if line == QUIT:
            break
        if line == NEW:
            turns = []
            continue
        if line:
            turns = _answered(saved, client_id, [*turns, {"role": "user", "content": line}], max_new_tokens)
    return 0


def _line(asked: bool) -> str | None:
    """What is asked next; None at the end."""
    try:
        return input("> " if asked else "").strip()
    except EOFError:
        return None


def _answered(saved: Saved, client_id: str, turns: Turns, max_new_tokens: int) -> Turns:
    """The conversation with its answer, which is printed; without its oldest exchanges where the model has no room."""
    encoder, config = saved.world.encoder, saved.world.base.model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None) or sys.maxsize
    try:
        ids = encoder.next_ids(turns)
        while len(ids) + max_new_tokens > room and len(turns) > 2:
            turns = turns[2:]
            ids = encoder.next_ids(turns)
        if len(ids) + max_new_tokens > room:
            raise FlexError(
                f"this is {len(ids)} tokens long, and the model has room for {room}, an answer of {max_new_tokens} "
                "included; expected less, or a smaller --max-new-tokens"
            )
    except FlexError as error:  # the conversation goes on without it
        print(f"flex: {error}", file=sys.stderr, flush=True)
        return turns[:-1]
    streamer = TextStreamer(encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = saved.answers(client_id, [ids], max_new_tokens, streamer)[0]
    return [*turns, {"role": "assistant", "content": answer}]
