"""One client's model behind transformers' own server, which speaks the OpenAI protocol.

    flex export --run runs/demo --client harbour --to harbour --merge
    python examples/serve.py harbour --port 8000      # pip install "transformers[serving]"
    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "harbour", "messages": [{"role": "user", "content": "which is larger , 3 or 14 ?"}]}'

A folder without grafts (a LoRA method, or the shared half) needs none of this: `transformers serve harbour`. The
tokenizer must have a chat template, and `data.template` must have been "chat", for the prompts to be those of training.
"""

import argparse
from pathlib import Path

from transformers.cli import serve
from transformers.cli.serving import model_manager

import flex_kernels


class GraftedManager(model_manager.ModelManager):
    """Transformers' own, which puts the folder's grafts on the model when it has loaded it."""

    def load_model_and_processor(self, model_id_and_revision, *args, **kwargs):
        model, processor = super().load_model_and_processor(model_id_and_revision, *args, **kwargs)
        folder = Path(model_id_and_revision.rpartition("@")[0])
        template = processor.chat_template or ""
        if template and "<|im_start|>" not in template and not getattr(processor, "response_template", None):
            # The server finds an answer by the marks of the model's family; this base has marks of its own.
            asked = [{"role": "user", "content": "?"}]
            start = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False).rpartition("?")[2]
            content = {"content": {"close": processor.eos_token, "content": "text"}}
            processor.response_template = {
                "defaults": {"role": "assistant"},
                "start_anchor": start.strip(),
                "fields": content,
            }
        bare = not any(hasattr(layer, "graft") for layer in flex_kernels.moe_layers(model).values())
        if bare and (folder / "grafts.safetensors").exists():
            flex_kernels.load_grafts(model, folder)
        return model, processor


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a folder that `flex export --merge` wrote.")
    parser.add_argument("folder", help="what flex export wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="auto", help='as of transformers serve, e.g. "cpu" or "cuda:0"')
    given = parser.parse_args()
    model_manager.ModelManager = GraftedManager
    # It runs until it is interrupted.
    serve.Serve(force_model=given.folder, host=given.host, port=given.port, device=given.device)


if __name__ == "__main__":
    main()
