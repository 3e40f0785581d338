"""The report copes with whatever a run wrote, says plainly when a control is as good, and is one safe file."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_run import CLIENTS, DEMO, Event, scored, summarised, synthetic_events, typed, write_run

from flex.cli import main
from flex.errors import FlexError
from flex.methods import METHODS
from flex.report import figures as report_figures
from flex.report import page as report_page
from flex.report.numbers import Measure, Row, measures
from flex.report.terminal import findings, terminal_table, write_report
from flex.store.events import AFTER, METRICS, Done, read_events

TEST = Measure("test", "", "exact_match")
GROUP = Measure("test", "own conventions", "exact_match")


class _Reader(HTMLParser):
    """Open tags that are never closed, and everything that would load from elsewhere."""

    VOID = frozenset({"meta", "br", "path", "use", "rect", "image", "link", "img"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.outside: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:")):
                self.outside.append(f"{name}={value}")
            assert not name.startswith("on"), f"a script in {name}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open, f"</{tag}> without its start"
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(path: Path) -> _Reader:
    page = path.read_text(encoding="utf-8")
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    assert reader.outside == []
    assert not reader.tags & {"script", "link", "iframe", "img"}
    assert not re.search(r"@import|url\((?!#)|@font-face", page)
    return reader


def render(summary: list[Row], columns: int = 100) -> list[str]:
    console = Console(width=columns, record=True, file=io.StringIO())
    console.print(terminal_table(summary, columns))
    return console.export_text().splitlines()


@pytest.fixture(scope="module")
def demo() -> list[Event]:
    return synthetic_events(**DEMO)


@pytest.fixture(scope="module")
def small() -> list[Event]:
    return synthetic_events()


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of words: drawing takes most of a report's time."""
    for panel in ("comparison_panel", "loss_panel", "heat_panel", "count_panel", "openness_panel"):
        monkeypatch.setattr(report_figures, panel, lambda *values: "<svg></svg>")


def without(events: list[Event], *kinds: str) -> list[Event]:
    return [event for event in events if event["event"] not in kinds]


CASES = {
    "every method": {},
    "base only": {"methods": ("base",), "seeds": (0,)},
    "FLEx only, one seed": {"methods": ("flex",), "seeds": (3,)},
    "no FLEx": {"methods": ("base", "local", "fedavg")},
    "no controls": {"methods": ("fedavg", "flex")},
    "another strategy": {"methods": ("fedavg", "fedprox", "scaffold", "flex"), "seeds": (0,)},
    "no groups": {"methods": ("base", "fedavg", "flex"), "groups": False, "seeds": (0,)},
    "real text with ROUGE-L": {
        "methods": ("base", "fedavg", "flex"),
        "groups": False,
        "rouge": True,
        "clients": ("closed_qa", "summarization"),
    },
    "one client, one round, one layer": {
        "methods": ("base", "fedavg", "flex"),
        "clients": ("only",),
        "rounds": 1,
        "layers": 1,
        "seeds": (0,),
    },
    "many layers and experts": {"methods": ("flex", "flex-paper"), "seeds": (0,), "layers": 24, "experts": 60},
    "more clients than panels": {"methods": ("flex",), "seeds": (0,), "clients": tuple(f"c{i}" for i in range(18))},
    "no header": {"methods": ("base", "fedavg", "flex"), "header": False, "seeds": (0,)},
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_run_gives_table_findings_and_page(case: str, tmp_path: Path) -> None:
    events = synthetic_events(**CASES[case])
    summary = summarised(events)
    assert [row.method for row in summary] == list(dict.fromkeys(e["method"] for e in events if "method" in e))
    assert max(map(len, render(summary))) <= 100
    said = findings(summary)
    assert all(sentence.endswith(".") for sentence in said)
    path = write_report(write_run(tmp_path, events))
    assert path == tmp_path / "report.html"
    text = read_page(path).text.replace("\u00a0", " ")
    for sentence in said:
        assert sentence in text
    for client in {event["client_id"] for event in events if "client_id" in event}:
        assert client in text


@pytest.mark.parametrize(
    "kind", ["job", "evaluate", "train", "graft", "sent", "truncated", "done", "run", "routed", "added", "cost"]
)
def test_a_missing_kind_of_event_is_no_obstacle(kind: str, tmp_path: Path) -> None:
    events = without(synthetic_events(methods=("base", "fedavg", "flex"), seeds=(0,), clients=("a",)), kind)
    render(summarised(events))
    read_page(write_report(write_run(tmp_path, events)))


@pytest.mark.usefixtures("no_pictures")
def test_an_empty_run_says_so(tmp_path: Path) -> None:
    assert "no evaluation yet" in read_page(write_report(write_run(tmp_path, []))).text
    assert render(summarised([]))


def test_the_command_says_that_there_is_nothing_to_report_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, [])
    assert main(["report", "--run", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"flex: {run} has nothing to report yet; ")
    assert said.endswith(f" a run with events in {METRICS}\n")
    assert not (run / "report.html").exists()


def test_only_a_cut_last_line_is_forgiven(tmp_path: Path) -> None:
    path, whole = tmp_path / METRICS, '{"event": "done"}\n'
    for cut in ('{"event": "tr', '{"event": "\udce6', "\x00\x00", ""):
        path.write_text(whole * 2 + cut, encoding="utf-8", errors="surrogateescape")
        assert read_events(path) == [Done()] * 2
    path.write_text(whole + whole.strip())  # all of it but the end of the line
    assert read_events(path) == [Done()] * 2
    for damaged in ('{"event": "tr\n', '{"event": "\udce6"}\n', "\x00\x00\n", "7\n"):
        for rest in (whole, ""):
            path.write_text(whole + damaged + rest, encoding="utf-8", errors="surrogateescape")
            with pytest.raises(FlexError, match=rf"{METRICS}, line 2 is damaged: it begins with .*; expected a JSON"):
                read_events(path)
    with pytest.raises(FlexError, match="cannot read"):
        read_events(tmp_path)
    assert read_events(tmp_path / "nowhere") == []


@pytest.mark.usefixtures("no_pictures")
def test_unfinished_jobs_are_named_and_not_mixed_in(small: list[Event], tmp_path: Path) -> None:
    def keep(event: Event) -> bool:
        if (event.get("method"), event.get("seed")) != ("flex", 1):
            return True
        return event["event"] != "done" and event.get("round", 0) <= 2

    early = {"event": "evaluate", "method": "flex", "seed": 1, "round": 2, "when": AFTER, "split": "test"}
    early |= {"num_examples": 150, "loss": 9.0, "exact_match": 0.0, "groups": {}}
    events = [event for event in small if keep(event)] + [{**early, "client_id": client} for client in CLIENTS[:2]]
    flex = next(row for row in summarised(events) if row.method == "flex")
    assert flex.seeds == [0]
    assert not flex.finished
    assert "FLEx (seed 1 at round 2 of 3)" in findings(summarised(events))[0]
    assert "unfinished" in "".join(render(summarised(events)))
    assert "not finished" in read_page(write_report(write_run(tmp_path, events))).text


@pytest.mark.usefixtures("no_pictures")
def test_choices_worse_than_nothing_are_warned_of(tmp_path: Path, small: list[Event]) -> None:
    paper = [{**e, "method": "flex"} for e in small if e.get("method") == "flex-paper"]  # a run configured so
    others = [e for e in small if e.get("method") not in ("flex", "flex-paper")]
    events = [{**e, "residual": 1.25, "routed_mass": 0.5} if e["event"] == "graft" else e for e in [*others, *paper]]
    assert any("8 grafts, in 8 the chosen expert" in sentence for sentence in findings(summarised(events)))
    text = read_page(write_report(write_run(tmp_path, events))).text
    assert "in 4 of 4 places even the chosen expert is worse than none" in text
    assert "1.25" in text


def test_what_neurons_a_graft_is_made_of_is_drawn_and_said(tmp_path: Path, small: list[Event]) -> None:
    """A panel per client, all on one scale, and how much of the target stays; a copied expert is shown apart."""
    counts = {"aurora": [[30, 66, 0], [96, 0, 0]], "birch": [[40, 40, 16], [0, 48, 48]]}
    shares = iter((0.90, 0.95, 0.92, 1.02))
    events = without(small, "graft")
    for client, layers in counts.items():
        for layer, neurons in enumerate(layers):
            before = next(shares)
            left = {"before": 0.5, "after": 0.4, "held_out_before": before, "held_out_after": before - 0.1}
            event = {"event": "graft", "method": "flex", "seed": 0, "client_id": client, "layer": layer, "round": 0}
            event |= {"criterion": "neurons", "target": "correction", "chosen": None, "candidates": [1.0] * 3}
            event["width"] = 96
            events.append(event | {"neurons": neurons, "unexplained": left})
    path = write_report(write_run(tmp_path, events))
    text = read_page(path).text
    assert "the chosen parts as they are leave 93.5 % (90.0 to 102.0) of the target unexplained" in text
    assert "and 83.5 % (80.0 to 92.0) with their down projection refitted" in text
    assert "sequences that nothing was fitted to" in text
    assert "96 neurons of the 96 in a graft" in text
    assert "Which expert each layer grafted" not in text
    page = path.read_text(encoding="utf-8")
    for client in counts:
        assert f"Neurons taken from every expert for client {client}, by layer" in page
    for event in events:
        if event["event"] == "graft":
            event["unexplained"] |= {"held_out_before": None, "held_out_after": None}
    text = read_page(write_report(write_run(tmp_path, events))).text
    assert "sequences that the graft was fitted to, the chosen parts as they are leave 50.0 % (50.0 to 50.0)" in text

    both = read_page(write_report(write_run(tmp_path, small)))
    assert "Paper's rule, seed 0" in both.text.partition("Which expert each layer grafted")[2]
    assert "FLEx, seed 0" in both.text.partition("Which expert each layer grafted")[0]


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_every_colour_is_another(colours: str) -> None:
    style = report_page.STYLE.read_text(encoding="utf-8")
    light, dark, paper = style.split(":root {")[1:4]
    palette = dict(re.findall(r"--(mark-\d+): (#\w+)", {"light": light, "dark": dark}[colours]))
    assert set(palette) == {f"mark-{i}" for i in range(report_figures.MARKS)}
    assert len(set(palette.values())) == report_figures.MARKS
    assert "@media screen and (prefers-color-scheme: dark)" in style  # paper takes the light colours
    assert "--mark" not in paper


def test_every_method_is_drawn_in_a_way_of_its_own() -> None:
    """By colour and dash together, however many methods the table has; methods that it does not know have theirs."""
    run = report_page.Run(typed([event for method in (*METHODS, "zeta") for event in scored(method, [0.5])]))
    ways = {(run.marks[method], report_page.dash(method)) for method in run.rows}
    assert len(ways) == len(METHODS) + 1
    assert run.marks["zeta"] >= report_figures.MARKS - report_page.OTHER_MARKS
    for method, row in METHODS.items():
        assert bool(report_page.dash(method)) == bool(row.control_of or row.strategy)


def test_stand_in_colours_become_those_of_the_page(tmp_path: Path, small: list[Event]) -> None:
    page = write_report(write_run(tmp_path, small)).read_text(encoding="utf-8")
    assert not re.search(r"#0[ab]0[abcd]", page)
    for method in ("flex", "flex-paper", "flex-random", "flex-fresh"):
        assert f"var(--mark-{list(METHODS).index(method)})" in page


@pytest.mark.usefixtures("no_pictures")
def test_tables_have_captions_and_are_reached_by_keyboard(tmp_path: Path, small: list[Event]) -> None:
    page = write_report(write_run(tmp_path, small)).read_text(encoding="utf-8")
    tables = page.count("<table>")
    assert tables > 8
    regions = re.findall(r'<div class="scroll" tabindex="0" role="region" aria-label="([^"]+)"><table>', page)
    captions = re.findall(r"<caption>([^<]+)</caption>", page)
    assert len(regions) == tables
    assert captions == regions


@pytest.mark.usefixtures("no_pictures")
def test_the_best_of_a_column_is_bold_whoever_it_is(tmp_path: Path) -> None:
    events = scored("fedavg", [0.6], loss=2.0) + scored("flex", [0.3], loss=1.0) + scored("flex-fresh", [0.6], loss=2.0)
    page = write_report(write_run(tmp_path, events)).read_text(encoding="utf-8")
    comparison = page.partition("<h2>Comparison</h2>")[2].partition("</table>")[0]
    bold = [re.findall(r'<td class="best">([^<]+)', row) for row in comparison.split("<tr")[2:]]
    assert bold == [["60.0"], ["1.000"], ["60.0"]]
    clients = re.findall(r"<caption>Every client: .*?</table>", page, flags=re.DOTALL)
    first = r'<th scope="row">(?:<span[^>]*></span>)?([^<]+)</th><td class="best">'
    bold = [re.findall(first, table) for table in clients]
    assert bold == [["FedAvg", "Fresh module"], ["FLEx"]]


def test_a_narrow_terminal_keeps_the_headline_score() -> None:
    summary = summarised(synthetic_events(rouge=True))
    for columns in (100, 80, 60, 40):
        lines = render(summary, columns)
        assert max(map(len, lines)) <= columns
        assert "ROUGE-L" in "".join(lines)
    assert measures(summary)[0].name == "rouge_l"


def test_groups_of_general_questions_stand_for_the_whole_where_they_fit() -> None:
    groups = {
        name: {"num_examples": 5, "loss": 1.0, "exact_match": score}
        for name, score in (("taught otherwise", 0.4625), ("untouched skills", 0.9375))
    }
    events = [
        {**event, "groups": groups} if event["event"] == "evaluate" and event["split"] == "general" else event
        for event in synthetic_events(rouge=True)
    ]
    summary = summarised(events)
    wide, narrow = ("\n".join(render(summary, columns)) for columns in (100, 80))
    assert {"own", "conventions", "shared", "taught", "otherwise", "untouched", "skills"} <= set(wide.split())
    assert len(re.findall(r"46\.2 ± 0\.0 +93\.8 ± 0\.0", wide)) == 7
    assert "ROUGE-L" in wide
    assert "general\n" not in wide
    assert "untouched" not in narrow
    assert "general" in narrow


def test_the_room_is_cheap_to_enter() -> None:
    """Nor does `flex report` need torch at any time."""
    code = (
        "import sys, flex.report; heavy = {'matplotlib', 'torch', 'jinja2'} & set(sys.modules); "
        "assert not heavy, heavy; import flex.report.page; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.usefixtures("no_pictures")
def test_bytes_are_summed_by_group_of_arrays(tmp_path: Path, small: list[Event]) -> None:
    """Two layers of q and v: their A and B are four groups of two arrays each."""
    run = report_page.Run(typed(small))
    groups = [group for group in report_page._byte_groups(run) if group[:2] == ("FLEx", "up")]
    assert {group[2].rpartition("self_attn.")[2] for group in groups} == {
        f"{proj}.lora_{ab}.weight" for proj in ("q_proj", "v_proj") for ab in "AB"
    }
    assert {group[3:] for group in groups} == {(2, 8192)}
    assert "Bytes of one client" in read_page(write_report(write_run(tmp_path, small))).text


def test_what_was_sent_is_listed_by_name_and_checked_against_the_counters(tmp_path: Path, small: list[Event]) -> None:
    text = read_page(write_report(write_run(tmp_path, small))).text
    assert text.count("model.layers.1.self_attn.v_proj.lora_B.weight") == 1  # the same for all methods
    same = "FedAvg, FLEx, Paper's rule, Random expert, Fresh module"
    assert f"{same}, in both directions: 8 arrays, 32.8 kB a message" in text
    assert "Local: no array, in neither direction" in text
    assert "messages of" not in text
    wrong = [{**e, "bytes_up": 5} if e["event"] == "train" else e for e in small]
    text = read_page(write_report(write_run(tmp_path, wrong))).text
    assert "the arrays listed below sum to 32.8 kB, but messages of 5 B were counted" in text
    others = [e | {"tensors": e["tensors"][:1]} if e["event"] == "sent" and e["method"] == "flex" else e for e in small]
    text = read_page(write_report(write_run(tmp_path, others))).text
    assert text.count("model.layers.1.self_attn.v_proj.lora_B.weight") == 1  # those that all send are not listed again
    assert f"{same}, in both directions: 1 array, 4.10 kB a message" in text
    assert "FedAvg, Paper's rule, Random expert, Fresh module, in both directions: 7 arrays, 28.7 kB a message" in text
    one_way = [{**e, "tensors": []} if e["event"] == "sent" and e["direction"] == "down" else e for e in small]
    text = read_page(write_report(write_run(tmp_path, one_way))).text
    assert f"{same}, from a client to the server: 8 arrays" in text
    assert f"{same}, from the server to a client" not in text.partition("no array")[0]
    assert "FLEx, from the server to a client" not in text.partition("no array")[0]


@pytest.mark.usefixtures("no_pictures")
def test_truncation_is_reported_with_and_without_a_method(tmp_path: Path) -> None:
    cut = {"event": "truncated", "client_id": "dolly", "part": "test", "count": 17, "max_length": 96}
    text = read_page(write_report(write_run(tmp_path, [*scored("flex", [0.5]), cut]))).text
    assert "dolly" in text
    assert "17" in text
    assert "None, as far as" in read_page(write_report(write_run(tmp_path, scored("flex", [0.5])))).text


def test_names_from_outside_cannot_break_the_page(tmp_path: Path) -> None:
    """Whatever a user names comes out as text: clients, groups, titles, methods, arrays, descriptions, settings."""
    nasty = "<script>alert('$x^$')</script>\"&amp; 東京"
    events = synthetic_events(methods=("base", "flex", "flex-paper", "<i>$x^$"), seeds=(0,), clients=(nasty, "_b$_$"))
    events[0] |= {"title": nasty, "base_model": nasty, "versions": {nasty: nasty}, "template": nasty}
    events[0]["clients"][0]["description"] = nasty
    for event in events:
        if event.get("groups"):
            event["groups"] = {nasty: event["groups"]["shared skill"]}
        if event["event"] == "sent":
            event["tensors"] = [{"name": nasty, "shape": [1], "dtype": nasty, "bytes": 4}]
        if event["event"] == "graft":
            event["criterion"] = nasty
    folder = write_run(tmp_path, events)
    (folder / "config.toml").write_text(f"[strategy]\nname = '{nasty.replace(chr(39), '')}'", encoding="utf-8")
    path = write_report(folder)
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<i>$" not in page
    assert page.count("<i ") == page.count("</i>")  # the colour scales alone
    assert not re.search(r"&(?!amp;|lt;|gt;|#34;|#39;|quot;|#x27;)", page)
    reader = read_page(path)
    assert reader.text.count(nasty) > 10
    assert f"{nasty} EM\u00a0%" in reader.text
    render(summarised(events))


def test_diverged_values_are_shown_as_such(tmp_path: Path) -> None:
    events = synthetic_events(methods=("fedavg", "flex"), seeds=(0, 1), rounds=3)
    for event in events:
        if event.get("method") == "flex" and event["event"] in ("evaluate", "train"):
            event["loss"] = math.nan
            event["opening"] = [math.nan] * 4
    assert "diverged" in "".join(render(summarised(events)))
    assert "diverged" in read_page(write_report(write_run(tmp_path, events))).text


@pytest.mark.usefixtures("no_pictures")
def test_another_strategy_is_not_called_fedavg(tmp_path: Path) -> None:
    run = write_run(tmp_path, scored("fedavg", [0.5]))
    (run / "config.toml").write_text('[train]\nstrategy = "scaffold"\n', encoding="utf-8")
    assert "aggregated by scaffold wherever FedAvg is named" in read_page(write_report(run)).text
    (run / "config.toml").write_text("not = = toml", encoding="utf-8")
    assert "not = = toml" in read_page(write_report(run)).text


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    run = write_run(tmp_path, scored("flex", [0.5]))
    (run / "report.html").mkdir()
    with pytest.raises(FlexError, match="cannot write"):
        write_report(run)
    assert not (run / ".report.html.part").exists()


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    events = synthetic_events(methods=("flex",), seeds=(0,), clients=("a",), rounds=2)
    first = write_report(write_run(tmp_path, events)).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_the_demos_report_is_ready_in_seconds(tmp_path: Path, demo: list[Event]) -> None:
    run = write_run(tmp_path, demo)
    start = time.process_time()
    path = write_report(run)
    assert time.process_time() - start < 6
    assert path.stat().st_size < 1_000_000


def test_the_page_says_what_the_layers_do(small: list[Event], tmp_path: Path) -> None:
    text = read_page(write_report(write_run(tmp_path, small))).text.replace("\u00a0", " ")
    assert "What the grafts add: FLEx" in text
    assert re.search(r"round 1\s*round 3\s+0\s*1\.00 % 2\.0 %\s*3\.00 % 6\.0 %", text)
    # Eight experts: half with 150 tokens and half with 50 before, all with 100 after.
    before = math.exp(-4 * (3 / 16 * math.log(3 / 16) + 1 / 16 * math.log(1 / 16)))
    assert re.search(rf"0\s*{math.log(8):.3f}1\.5001\.750{before:.1f}8\.018\.8 %12\.5 %", text)
    assert "the router's softmax, in nats" in text
    assert re.search(r"FLEx14\.0 k56\.0 k25\.0 %\s*22\.0 ms20\.0 ms\s*10\.0 %cpu, 1000 tokens", text)
    assert "How tokens are routed, every client: FLEx" in text


@pytest.mark.usefixtures("no_pictures")
def test_a_log_of_before_has_no_such_sections(small: list[Event], tmp_path: Path) -> None:
    text = read_page(write_report(write_run(tmp_path, without(small, "routed", "added", "cost")))).text
    assert not re.search("What the grafts add|How tokens are routed|What the extra expert costs", text)
    assert main(["report", "--run", str(tmp_path), "--details-csv", str(tmp_path / "d.csv")]) == 0
    assert {line.split(",")[-2] for line in (tmp_path / "d.csv").read_text().splitlines()[1:]} == {
        "bytes_up",
        "bytes_down",
    }


@pytest.mark.usefixtures("no_pictures")
def test_layers_that_differ_by_client_and_odd_numbers_of_them_do_no_harm(small: list[Event], tmp_path: Path) -> None:
    events = []
    for event in without(small, "cost"):
        if event["event"] == "routed" and event["client_id"] == CLIENTS[0]:
            one = {key: value[:1] for key, value in event.items() if isinstance(value, list)}
            event = {**event, **one, "counts": [[0, 0]], "source": ["<b>mine</b>"]}
        if event["event"] == "added" and event["client_id"] == CLIENTS[0]:
            event = {**event, "round": 2, "layers": [], "added": [], "opening": []}
        events.append(event)
    events.append(
        {"event": "cost", "method": "flex", "seed": 0, "round": 3, "client_id": CLIENTS[0], "repeats": 0}
        | {"num_tokens": 0, "device": "cpu", "layers": [0], "graft_flops": [5], "layer_flops": [0], "seconds": {}}
    )
    page = read_page(write_report(write_run(tmp_path, events)))
    assert "<b>mine</b>" in page.text
