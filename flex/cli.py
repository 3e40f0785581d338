"""`flex`: the command line. Every command reads its arguments, calls one function below, and prints what it gives."""

import argparse
import os
import sys
from pathlib import Path

from flex.errors import FlexError

EXAMPLES = """examples:
  flex demo                                        a federated run on a small model, in minutes, on a laptop
  flex train configs/paper.toml --set model.path=Qwen/Qwen1.5-MoE-A2.7B --data dolly.jsonl --clients-by category
  flex graft configs/paper.toml                    which expert each layer would graft, and what every other would leave
  flex eval --run runs/demo                        score what was trained, anew, from the files
  flex generate --run runs/demo --client harbour --prompt "which is larger, 3 or 14?"
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flex",
        description="Personalised federated fine-tuning of Mixture-of-Experts models: clients share LoRA on attention; "
        "each keeps one grafted expert per layer to itself.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="generate data, train every method on the shipped base, write the report")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the run (default: %(default)s)")
    _add_overrides(demo)

    train = commands.add_parser("train", help="run a configuration from data to report; called again, it resumes")
    _add_configuration(train)
    train.add_argument("--output", help="folder of the run (default: the configuration's `output`)")

    graft = commands.add_parser("graft", help="choose the grafts and print, per layer, the loss of every candidate")
    _add_configuration(graft)
    graft.add_argument("--client", help="this client only (default: all)")

    score = commands.add_parser("eval", help="score the clients of a finished or running run from its files")
    _add_run(score)
    score.add_argument("--client", help="this client only (default: all)")

    generate = commands.add_parser("generate", help="answer a prompt with the model of one client")
    _add_run(generate)
    generate.add_argument("--client", required=True, help="whose graft to use")
    generate.add_argument("--prompt", required=True, help="the instruction")
    generate.add_argument("--context", default="", help="what the instruction speaks about, if anything")
    generate.add_argument("--max-new-tokens", type=int, default=128, help="at most this many (default: %(default)s)")

    report = commands.add_parser("report", help="write report.html of a run anew from its metrics.jsonl")
    report.add_argument("--run", type=Path, required=True, help="folder of the run")

    commands.add_parser("pretrain", help="pretrain a small MoE base: the demo's, or one on your own text")
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change one setting, e.g. --set train.rounds=3; may be repeated",
    )


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="the run; see configs/")
    parser.add_argument("--model", help="folder or hub name of the base (data.model)")
    parser.add_argument("--data", help="training examples: .jsonl or .jsonl.gz with instruction, context, response")
    parser.add_argument("--test", help="test examples; without it a share of --data is held out")
    parser.add_argument("--clients-by", help="the column that says whose an example is")
    parser.add_argument("--clients", nargs="+", help="only these values of that column (default: all)")
    _add_overrides(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--method", default="flex", help="which method's weights (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="which seed's weights (default: the run's first)")


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """The named options as the settings they stand for; `--set` comes last and wins."""
    named = {
        "model.path": arguments.model,
        "data.train": arguments.data,
        "data.test": arguments.test,
        "data.clients_by": arguments.clients_by,
    }
    overrides = [f"{key}={value}" for key, value in named.items() if value is not None]
    if arguments.clients:
        overrides.append(f"data.clients={list(arguments.clients)}")
    return overrides + arguments.overrides


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["pretrain"]:
        from flex.pretrain import main as pretrain

        return pretrain(words[1:])
    given = build_parser().parse_args(words)
    try:
        return _dispatch(given)
    except FlexError as error:
        print(f"flex: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flex: interrupted; the same command goes on where the last round ended", file=sys.stderr)
        return 130


def _dispatch(given: argparse.Namespace) -> int:
    # torch and transformers take seconds to import: only commands that need them pay for it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if given.command == "report":
        from flex.report import write_report

        print(write_report(given.run))
        return 0
    from flex import commands

    if given.command == "demo":
        return commands.demo(given.output, given.overrides)
    if given.command == "train":
        return commands.train(given.config, _overrides(given), given.output)
    if given.command == "graft":
        return commands.graft(given.config, _overrides(given), given.client)
    if given.command == "eval":
        return commands.evaluate(given.run, given.method, given.seed, given.client)
    return commands.generate(
        given.run, given.method, given.seed, given.client, given.prompt, given.context, given.max_new_tokens
    )


if __name__ == "__main__":
    sys.exit(main())
