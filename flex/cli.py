"""`flex`: the command line. Every command reads its arguments, calls one function below, and prints what it gives."""

import argparse
import os
import sys
from importlib import metadata
from pathlib import Path

from flex.commands import sites
from flex.config import to_toml
from flex.errors import FlexError, require
from flex.methods import MAIN

EXAMPLES = """examples:
  flex demo                      a federated run on a small model, in minutes, on a laptop
  flex train configs/paper.toml --model Qwen/Qwen1.5-MoE-A2.7B --data train.jsonl --test test.jsonl
  flex graft --model Qwen/Qwen1.5-MoE-A2.7B --data train.jsonl --clients-by category
                                 what each layer would graft (by default neurons), and how much that explains
  flex eval --run runs/demo      score what was trained, from its files
  flex export --run runs/demo --client harbour --to harbour
                                 a folder that peft and flex_kernels load
  flex generate --run runs/demo --client harbour --prompt "which is larger, 3 or 14?"
  flex chat --run runs/demo --client harbour
"""
# The settings that have an option of their own. What it is given is the setting's text as it stands, never TOML.
NAMED = {
    "model": "model.path",
    "clients_by": "data.clients_by",
    "split": "data.split",
    "label_by": "data.label_by",
    "num_clients": "data.num_clients",
    "clients": "data.clients",
    "output": "output",
    "strategy": "strategy.name",
}
# One file with a column that names the client, or a file a client: an option, and the settings of either.
FILES = {"data": ("data.train", "data.files"), "test": ("data.test", "data.test_files")}
LISTS = {"methods": "train.methods", "seeds": "train.seeds", "rounds": "train.rounds"}  # with blanks or commas between
NUMBERS = {"seeds", "rounds"}
RESUMED = {"demo", "train"}  # commands that go on where they were stopped


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flex",
        description="Personalised federated fine-tuning of Mixture-of-Experts models: clients share LoRA on attention; "
        "each keeps one grafted expert per layer to itself.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flex {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="generate data, train every method on the shipped base, write the report")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the run (default: %(default)s)")
    _add_overrides(demo)

    train = commands.add_parser("train", help="run a configuration from data to report; called again, it resumes")
    _add_configuration(train)
    train.add_argument("--output", help="folder of the run (default: the configuration's `output`)")
    train.add_argument("--methods", nargs="+", help="which methods to compare, e.g. --methods fedavg flex")
    train.add_argument("--seeds", nargs="+", help="which seeds, e.g. --seeds 0,1,2")
    train.add_argument("--tune", action="store_true", help="choose each method's rates (and the server's step) first")
    train.add_argument("--num-seeds", type=int, metavar="N", help="seeds 0 to N - 1, instead of --seeds")
    train.add_argument("--rounds", nargs=1, help="how many rounds")
    train.add_argument("--strategy", help="how the server aggregates (strategy.name)")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="tell clients, lengths, memory and minutes from a few steps; write nothing",
    )

    graft = commands.add_parser(
        "graft", help="choose the grafts; show per layer what is taken and how much it explains"
    )
    _add_configuration(graft)
    graft.add_argument("--client", help="this client only (default: all)")

    score = commands.add_parser("eval", help="score the clients of a finished or running run from its files")
    _add_run(score)
    score.add_argument("--client", help="this client only (default: all)")
    score.add_argument("--test", default="", metavar="FILE", help="other test examples; needs no training data")
    _add_overrides(score)  # of [evaluate]: further tasks, e.g. --set evaluate.tasks='["test","mmlu"]'

    generate = commands.add_parser(
        "generate", help="answer one prompt, or a file of them, with the model of one client"
    )
    _add_run(generate)
    generate.add_argument("--client", required=True, help="whose graft to use")
    asked = generate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="the instruction")
    asked.add_argument(
        "--prompts",
        metavar="FILE",
        help="a file of prompts, text (one a line) or JSON lines, or - for standard input; gives JSON lines",
    )
    generate.add_argument("--context", default="", help="what the instruction speaks about, if anything")
    generate.add_argument("--batch-size", type=int, help="prompts answered at once (default: the run's)")
    _add_length(generate)

    chat = commands.add_parser("chat", help="a conversation with the model of one client, line by line")
    _add_run(chat)
    chat.add_argument("--client", required=True, help="whose graft to use")
    _add_length(chat)

    export = commands.add_parser("export", help="write what was trained as a folder for transformers and peft")
    _add_run(export)
    export.add_argument("--client", help="with what this client keeps to itself (default: the shared half alone)")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    export.add_argument("--merge", action="store_true", help="merge the LoRA into the base; grafts stay files")

    sites.add_parsers(commands)

    anchors = commands.add_parser("anchors", help="draw general text from a base, to hold a run to it (anchor.text)")
    anchors.add_argument("--model", required=True, help="folder or hub name of the base")
    anchors.add_argument("--to", type=Path, required=True, metavar="FILE", help="JSON lines; not there yet")
    anchors.add_argument("--count", type=int, default=256, help="so many texts (default: %(default)s)")
    anchors.add_argument("--length", type=int, default=128, help="tokens of each, at most (default: %(default)s)")
    anchors.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")

    report = commands.add_parser("report", help="write report.html of a run from its metrics.jsonl")
    report.add_argument("--run", type=Path, required=True, help="folder of the run")
    report.add_argument("--csv", type=Path, metavar="FILE", help="also the numbers, a line for each method and measure")
    report.add_argument(
        "--details-csv", type=Path, metavar="FILE", help="also bytes by group of arrays, and each layer's measures"
    )

    compare = commands.add_parser("compare", help="write one page over several runs")
    compare.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders of runs; the first is the reference"
    )
    compare.add_argument("--to", type=Path, default=Path("compare.html"), help="the page (default: %(default)s)")
    compare.add_argument("--csv", type=Path, metavar="FILE", help="also the numbers of all runs")
    compare.add_argument("--latex", type=Path, metavar="FILE", help="also the table of scores for a paper")

    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change one setting, e.g. --set train.rounds=3; may be repeated. flex/config.py lists the settings and "
        "their defaults, flex/methods.py those of graft",
    )


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="the run; see configs/")
    parser.add_argument("--model", help="folder or hub name of the base (model.path)")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="training examples, see docs/your-data.md: a file for all clients, or NAME=FILE for each client",
    )
    parser.add_argument(
        "--test", nargs="+", metavar="FILE", help="test examples, alike; without it a share of --data is held out"
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="OURS=THEIRS",
        help="what the files call instruction, context, response or messages, e.g. --columns instruction=question",
    )
    parser.add_argument("--clients-by", help="the column that says whose an example is")
    parser.add_argument("--split", help="how records are dealt out: column (default), iid, pathological, dirichlet")
    parser.add_argument("--label-by", help="the column of the categories that a drawn split deals out")
    parser.add_argument("--num-clients", type=int, help="of a drawn split")
    parser.add_argument("--clients", nargs="+", help="only these values of that column (default: all)")
    _add_overrides(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--method", default=MAIN, help="which method's weights (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="which seed's weights (default: the run's first)")


def _add_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=128, help="at most this many (default: %(default)s)")


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """The named options as the settings they stand for; `--set` comes last and wins."""
    for words in (arguments.data, arguments.test, arguments.columns):
        if arguments.config is None and len(words or ()) > 1 and words[-1].endswith(".toml"):
            arguments.config = Path(words.pop())  # the configuration, after an option that takes several files
    last = (arguments.clients or [""])[-1]
    require(
        arguments.config is not None or not last.endswith(".toml"),
        f"--clients took {last!r} for a client; expected the configuration before the options: "
        f"flex {arguments.command} {last} --clients ...",
    )
    given = {key: getattr(arguments, name, None) for name, key in NAMED.items()}
    for name, key in LISTS.items():
        words = [word for text in getattr(arguments, name, None) or () for word in text.split(",") if word]
        if words:
            values = [_number(f"--{name}", word) for word in words] if name in NUMBERS else words
            given[key] = values[0] if name == "rounds" else values
    for name, (one, several) in FILES.items():
        words = getattr(arguments, name, None)
        if words is not None:
            files = _pairs(f"--{name}", words, "NAME=FILE for each client")
            given |= {one: "" if files else words[0], several: files}
            if files and name == "data":  # what a configuration says of one file with a column does not hold here
                require(
                    arguments.clients_by is None,
                    "--clients-by names a column, but --data has a file for each client; expected one of the two",
                )
                given |= {"data.test": "", "data.clients": given["data.clients"] or []}
    if arguments.columns is not None:
        given["data.columns"] = _pairs("--columns", arguments.columns, "OURS=THEIRS")
    if (count := getattr(arguments, "num_seeds", None)) is not None:
        require(count >= 1, f"--num-seeds is {count}; expected 1 or more")
        require(not arguments.seeds, "--seeds and --num-seeds both say which seeds; expected one of the two")
        given["train.seeds"] = list(range(count))
    if arguments.clients_by is not None and arguments.clients is None:
        given["data.clients"] = []  # a configuration's clients are values of its own column
    return [f"{key}={to_toml(value)}" for key, value in given.items() if value is not None] + arguments.overrides


def _pairs(option: str, words: list[str], expected: str) -> dict[str, str]:
    """`NAME=VALUE` words as a table; empty for the one file of all clients (a path may have a "=" in it)."""
    if option != "--columns" and len(words) == 1:
        name, sign, file = words[0].partition("=")
        if not sign or not name.strip() or Path(words[0]).exists() or not Path(file).exists():
            return {}
    pairs: dict[str, str] = {}
    for word in words:
        name, sign, value = word.partition("=")
        require(bool(sign and name.strip() and value), f"{option} got {word!r}; expected {expected}")
        require(name not in pairs, f"{option} names {name!r} twice; expected each once")
        pairs[name] = value
    return pairs


def _number(option: str, text: str) -> int:
    require(text.lstrip("-").isdecimal(), f"{option} got {text!r}; expected whole numbers")
    return int(text)


def _version() -> str:
    try:
        return metadata.version("flex-moe")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    try:
        given = build_parser().parse_args(words)
        overrides = _overrides(given) if "clients_by" in given else []
        # torch and transformers take seconds to import: only commands that need them pay for it.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        for stream in (sys.stdout, sys.stderr):  # a terminal or log without Unicode shows a "?" for what it lacks
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        match given.command:
            case "report":
                from flex.commands import report

                return report.report(given.run, given.csv, given.details_csv)
            case "compare":
                from flex.commands import report

                return report.compare(given.runs, given.to, given.csv, given.latex)
            case "demo":
                from flex.commands import train

                return train.demo(given.output, given.overrides)
            case "train":
                from flex.commands import train

                if given.dry_run:
                    return train.dry_run(given.config, overrides)
                if given.tune:
                    return train.tuned(given.config, overrides)
                return train.train(given.config, overrides)
            case "graft":
                from flex.commands import graft

                return graft.graft(given.config, overrides, given.client)
            case "anchors":
                from flex.commands import anchors

                return anchors.anchors(given.model, given.to, given.count, given.length, given.seed)
            case "export":
                from flex.commands import export

                return export.export(given.run, given.method, given.seed, given.client, given.to, given.merge)
            case "eval":
                from flex.commands import saved

                return saved.evaluate(
                    given.run, given.method, given.seed, given.client, given.test, *filter(None, [given.overrides])
                )
            case "deploy" | "worker" | "node":
                return sites.dispatch(given)
            case "chat":
                from flex.commands import chat

                return chat.chat(given.run, given.method, given.seed, given.client, given.max_new_tokens)
            case _:
                from flex.commands import saved

                if given.prompts is not None:
                    require(not given.context, "--context goes with --prompt; in a file of prompts it is a column")
                    return saved.generate_all(
                        given.run,
                        given.method,
                        given.seed,
                        given.client,
                        given.prompts,
                        given.max_new_tokens,
                        given.batch_size,
                    )
                return saved.generate(
                    given.run,
                    given.method,
                    given.seed,
                    given.client,
                    given.prompt,
                    given.context,
                    given.max_new_tokens,
                )
    except FlexError as error:
        print(f"flex: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "; the same command goes on where the last round ended" if set(words[:1]) & RESUMED else ""
        print(f"flex: interrupted{goes_on}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
