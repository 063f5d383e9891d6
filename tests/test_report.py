"""The HTML report: what stands in it, that it asks for nothing, and what is refused. How it looks was judged by eye."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.errors import ConfigError
from fedsim.report import html
from fedsim.report.html import write_report
from fedsim.report.timeline import write_own_timeline
from fedsim.rundir import RunDir, read_summary
from tests.cli import QUICK, Fedsim, only_run, process
from tests.run_dirs import AVG, DATA, PROX, fill, make_run, rounds, timed_run

NAN = math.nan


class Page(HTMLParser):
    """A report, parsed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        self.texts.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "link", "img", "br", "line"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def row(self, first: str) -> list[str]:
        """The first row of a table that begins with a cell."""
        return next(row for row in self.rows if row and row[0] == first)

    @property
    def pictures(self) -> list[str]:
        """Titles."""
        return [title.strip() for title in self.texts.get("figcaption", [])]

    @property
    def sections(self) -> list[str]:
        return self.texts.get("h2", [])


def page(*runs: Path, out: Path | None = None) -> Page:
    return Page(write_report(runs, out))


def example(path: Path, seed: int = 1, config: str = AVG, records: list[dict[str, Any]] | None = None) -> Path:
    """A finished run with everything."""
    extra = {
        "final": {
            "test_accuracy": 0.7831,
            "test_loss": 0.5,
            "client_accuracy_mean": 0.5,
            "client_accuracy_std": 0.408,
            "client_accuracy_worst10": 0.0,
            "class_accuracy": [0.7831, None],
        },
        "totals": {"bytes_down": 3 * 1024**3, "bytes_up": 1024**3, "clients": 12, "steps": 30, "wall_seconds": 185.0},
        "num_parameters": 55210,
        "params_sha256": "ab" * 32,
        "state_sha256": "cd" * 32,
        "versions": {"python": "3.11.7", "torch": "2.6"},
        "commit": "f" * 40,
    }
    found = records if records is not None else rounds([0.25, None, 0.5, 0.75, 0.7831])
    return fill(make_run(path, seed, 0.7831, f"{config}\n{DATA}", found, **extra))


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every file below a folder with what it holds; folders and broken links hold nothing."""
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def unfinished(path: Path, seed: int = 1, config: str = AVG) -> Path:
    run = make_run(path, seed, config=f"{config}\n{DATA}", records=rounds([0.25, 0.5, 0.4]))
    (run / "summary.json").unlink()
    return run


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by the driver."""
    from fedsim.experiment import simulate

    folder = tmp_path_factory.mktemp("real")
    return simulate([*QUICK, "rounds=3", f"run_dir={folder}", "tracker=[]"]).run_dir


# --- one run ----------------------------------------------------------------------------------------------


def test_a_run_is_told_in_numbers_that_people_read(tmp_path: Path) -> None:
    found = page(example(tmp_path / "a"))
    cards = dict(zip(found.texts["dt"], (" ".join(dd.split()) for dd in found.texts["dd"]), strict=True))
    assert cards == {
        "Final test accuracy": "78.31 %",
        "Best test accuracy": "75.00 % round 4",
        "Final test loss": "0.5000",
        "Rounds": "5 of 5",
        "Sent": "4.0 GiB down and up together",
        "Wall time": "3:05",
    }
    assert found.row("global model")[1:] == ["50.00 %", "40.80 %", "0.00 %"]
    assert found.row("0") == ["0", "cat", "1,234", "10", "78.31 %", "50.00 %", "61.00 %"]
    assert found.row("1") == ["1", "<b>dog", "10", "0", "–", "–", "–"]  # what is in a file is text, never markup
    # Sizes 10, 20, 10 and 5 from the offsets.
    assert found.row("4") == ["4", "45", "5", "10.0", "11.2", "20"]
    assert "Training and held-out examples of each client" in found.texts["caption"]
    assert found.row("Clients trained") == ["Clients trained", "12", "2.4"]
    assert found.row("Strategy")[1] == "FedAvg (server_lr=1)"
    assert found.row("SHA-256 of parameters")[1] == "ab" * 32 and found.row("Commit")[1] == "f" * 40
    assert found.row("torch")[1] == "2.6"
    assert "seed: 1" in found.texts["pre"][0] and "finished" in found.texts["span"]
    assert found.sections == [
        "What ran", "Curves", "Clients", "Classes", "Partition", "Cost", "Versions and hashes"
    ]  # fmt: skip


def test_curves_stand_against_everything_that_was_counted(tmp_path: Path) -> None:
    found = page(example(tmp_path / "a"))
    assert found.texts["h3"] == ["Against rounds", "Against bytes sent", "Against virtual time", "Against wall time"]
    assert found.pictures == ["Accuracy", "Loss"] * 4 + ["Accuracy of each client", "Sizes of the clients"]
    still = [{**r, "virtual_seconds": 0.0} for r in rounds([0.5, 0.6])]
    found = page(example(tmp_path / "b", records=still))
    assert "Against virtual time" not in found.texts["h3"] and len(found.texts["h3"]) == 3
    assert "Against virtual time: left out, because none was counted." in found.texts["p"]


def test_pictures_say_what_they_show(tmp_path: Path) -> None:
    images = page(example(tmp_path / "a")).all("img")
    alt = images[0]["alt"]
    assert alt == "Accuracy against rounds. From first to last: test 25.00 % to 78.31 %."
    assert all(len(image["alt"]) > 20 for image in images)
    for image in images:
        kind, _, content = image["src"].partition(";base64,")
        assert kind == "data:image/svg+xml"
        text = base64.b64decode(content).decode()
        assert ElementTree.fromstring(text).tag.endswith("svg") and "<text" in text


def test_personal_and_fine_tuned_models_are_shown_where_there_are_such(tmp_path: Path) -> None:
    more = {"client_accuracy_mean": 0.5, "personal_accuracy_mean": 0.75, "finetuned_accuracy_mean": 0.625}
    run = make_run(
        tmp_path / "a", 1, config=f"{AVG}\n{DATA}", records=rounds([0.5, 0.6], **more), final={**more, "test_loss": 1}
    )
    (run / "clients.csv").write_text("client,accuracy,personal_accuracy,finetuned_accuracy\n0,0,0.5,1\n1,1,1,0.25\n")
    found = page(run)
    assert [found.row(mode)[1] for mode in ("global model", "personal models", "fine-tuned models")] == [
        "50.00 %", "75.00 %", "62.50 %"
    ]  # fmt: skip
    assert "Mean accuracy on clients' own examples" in found.pictures
    alt = next(i["alt"] for i in found.all("img") if i["alt"].startswith("Accuracy of each client"))
    assert "personal models 50.00 % to 100.00 %" in alt and "fine-tuned models 25.00 % to 100.00 %" in alt


def test_a_regression_is_told_by_its_loss(tmp_path: Path) -> None:
    records = [{"round": n, "test_loss": 1.0 / n, "train_loss": 1.0, "client_loss_mean": 2.0} for n in (1, 2)]
    final = {"test_loss": 0.5, "client_loss_mean": 2.0, "client_loss_std": 0.5, "client_loss_worst10": 3.0}
    run = make_run(tmp_path / "a", 1, config=f"{AVG}\n{DATA}", records=records, final=final, best=final)
    (run / "clients.csv").write_text("client,loss\n0,1.0\n1,3.0\n")
    found = page(run)
    assert found.pictures == ["Loss", "Mean loss on clients' own examples", "Loss of each client"]
    assert found.row("global model")[1:] == ["2.0000", "0.5000", "3.0000"]
    assert found.all("img")[-1]["alt"].endswith("From the worst client to the best: global model 3.0000 to 1.0000.")
    assert "ccuracy" not in re.sub(r"base64,[^\"]*|<pre>.*?</pre>", "", found.source, flags=re.DOTALL)


def waiting(path: Path, seed: int = 1, config: str = AVG, staleness: bool = False) -> Path:
    """A run of two clients, of which one waits for the other: 50 % accuracy after two rounds of 2 virtual seconds."""
    visits = [(c, 2.0 * n, 2.0 * n + 1 + c, 4, "done") for n in range(2) for c in range(2)]
    tables = [{"0": 1, "3": 1}] * 2 if staleness else []
    run = timed_run(path, visits, [2, 4], tables, seed, f"{config}\neval: {{target_accuracy: 0.5}}")
    write_own_timeline(run, path.name)
    return run


def test_who_worked_when_is_told_of_runs_whose_clients_wait(tmp_path: Path) -> None:
    found = page(waiting(tmp_path / "a", staleness=True))
    assert found.sections.index("Virtual time") < found.sections.index("Cost")
    assert {"Who worked when", "Staleness of the contributions"} <= set(found.pictures)
    # Of an event-driven run idle time counts to the client's last task: client 0 waits for one of three seconds.
    assert ["2", "4", "16.67 %", "0.00 %", "33.33 %", "1.50", "3", "4.0 s"] in found.rows
    # Both accuracies are 50 %: the target is reached in round 1, after 2 s, 1 + 1 bytes, one contribution.
    assert ["2.0 s", "1", "2 B", "1"] in found.rows
    drawn = {image["src"] for image in found.all("img")}
    picture = base64.b64encode((tmp_path / "a" / "figures" / "timeline.png").read_bytes()).decode()
    assert f"data:image/png;base64,{picture}" in drawn


def test_runs_are_told_beside_each_other_in_virtual_time(tmp_path: Path) -> None:
    runs = [waiting(tmp_path / f"a{s}", s) for s in (1, 2)]
    runs.append(waiting(tmp_path / "b", 1, PROX % 1, staleness=True))
    found = page(*runs)
    assert "Who worked when (the first seed of each)" in found.pictures
    assert "Share of the contributions that were at most so many global models old" in found.pictures
    # To the end of the run one client of FedAvg waits for two of four seconds.
    assert found.row("strategy=fedavg, seed 2")[1:4] == ["2", "4", "25.00 %"]
    assert "virtual time to 50 %" in found.rows[0]


def test_a_run_whose_rounds_all_look_the_same_has_no_timeline(tmp_path: Path) -> None:
    run = waiting(tmp_path / "a")
    (run / "timeline.csv").unlink()  # as a driver leaves it that wrote none
    assert "Who worked when" not in page(run).pictures


def test_a_target_that_was_not_reached_is_said(tmp_path: Path) -> None:
    run = example(tmp_path / "a", config=f"{AVG}\neval: {{target_accuracy: 0.8}}")
    assert "A test accuracy of 80 % was not reached." in page(run).texts["p"]


def test_an_unfinished_run_is_told_as_far_as_it_came(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "test_acc')  # what a killed driver leaves
    (run / "failure.json").write_text(json.dumps({"round": 4, "client": 3, "error": "round 4, client 3: <no> luck"}))
    found = page(run)
    assert found.texts["span"] == ["unfinished after round 3 of 5"]
    assert "The run was ended by an error. round 4, client 3: <no> luck" in found.texts["p"]
    assert f"Not finished; go on with: fedsim resume={run}" in found.texts["p"]
    cards = dict(zip(found.texts["dt"], (" ".join(dd.split()) for dd in found.texts["dd"]), strict=True))
    assert (cards["Latest test accuracy"], cards["Best test accuracy"]) == ("40.00 %", "50.00 % round 2")
    assert cards["Rounds"] == "3 of 5" and cards["Sent"].startswith("4.4 KiB")  # 3 rounds of 1,500 bytes
    assert found.row("Clients trained") == ["Clients trained", "9", "3"]


def test_the_best_round_of_an_unfinished_regression_has_the_lowest_loss(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "a")
    records = [{"round": n, "test_loss": v} for n, v in enumerate((0.9, 0.2, None, 0.5), start=1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = page(run)
    cards = dict(zip(found.texts["dt"], (" ".join(dd.split()) for dd in found.texts["dd"]), strict=True))
    assert (cards["Latest test loss"], cards["Best test loss"]) == ("0.5000", "0.2000 round 2")


def test_a_run_on_its_way_is_not_told_like_a_dead_one(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "a")
    with RunDir(run).lock():
        found = page(run)
        assert not any("resume" in p for p in found.texts["p"])
    assert found.texts["span"] == ["running, round 3 of 5"]
    assert "Still running; this page shows it as far as it had come." in found.texts["p"]
    assert page(run).texts["span"] == ["unfinished after round 3 of 5"]
    with RunDir(run).lock():  # asking left nothing behind that would keep a run from going on
        pass


def test_what_an_earlier_end_left_is_not_shown_of_a_run_that_goes_on(tmp_path: Path) -> None:
    run = example(tmp_path / "a")
    (run / "summary.json").unlink()
    found = page(run)
    assert "Classes" not in found.sections and "Clients" not in found.sections


def test_clients_that_come_with_the_data_count_what_they_train_on(tmp_path: Path) -> None:
    run = example(tmp_path / "a")
    np.savez(run / "partition.npz", sizes=np.array([7, 9]))
    found, other = page(run), page(run, example(tmp_path / "b", 2))
    assert "Training examples of each client" in found.texts["caption"]
    picture = next(i for i in found.all("img") if i["alt"].startswith("Histogram"))
    assert picture["alt"] == "Histogram of the clients' training examples, from 7 to 9."
    text = base64.b64decode(picture["src"].partition(",")[2]).decode()
    assert "training examples of a client" in text and "held-out" not in text
    assert found.row("2")[:2] == ["2", "16"] and "Training examples of each client" in other.texts["caption"]


def test_a_run_that_stopped_early_says_why(tmp_path: Path) -> None:
    run = example(tmp_path / "a", records=rounds([0.25, None, 0.5]))
    (run / "summary.json").write_text(json.dumps({**read_summary(run), "rounds": 3, "stopped": "virtual time < 6 s"}))
    assert page(run).texts["span"] == ["stopped after round 3 of 5: virtual time < 6 s"]


def test_what_a_run_lacks_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 1, config="x: 1", records=[{"round": 1}], final={}, best={}, totals={})
    found = page(run)
    assert found.sections == ["What ran", "Curves", "Cost", "Versions and hashes"]
    assert found.pictures == [] and "Against bytes sent: left out, because none was counted." in found.texts["p"]
    assert found.texts["dt"] == ["Rounds", "Sent", "Wall time"]


def test_numbers_that_became_nan_are_shown(tmp_path: Path) -> None:
    records = [{**r, "test_loss": None, "train_loss": None} for r in rounds([0.1, 0.1])]
    run = make_run(tmp_path / "a", 1, config=AVG, records=records, final={"test_accuracy": 0.1, "test_loss": None})
    assert "nan" in [dd.strip() for dd in page(run).texts["dd"]]


def test_a_hundred_classes_scroll_in_their_box_below_the_worst_five(tmp_path: Path) -> None:
    run = example(tmp_path / "a")
    lines = [f"{i},class {i},{i / 100}" for i in range(100)]
    (run / "classes.csv").write_text("\n".join(["class,name,accuracy", *reversed(lines)]) + "\n")
    summary = read_summary(run)
    summary["final"]["class_accuracy"] = [i / 100 for i in range(100)]
    (run / "summary.json").write_text(json.dumps(summary))
    found = page(run)
    worst = ", ".join(f"class {i} ({i}.00 %)" for i in range(5))
    assert f"Lowest accuracy: {worst}." in found.texts["p"]
    assert "box tall" in [d.get("class") for d in found.all("div")] and found.row("99")[2] == "99.00 %"


def test_long_runs_and_many_clients_make_a_small_page(tmp_path: Path) -> None:
    values = [0.5 + 0.4 * math.sin(n * n) for n in range(20_000)]
    run = example(tmp_path / "a", records=rounds(values))
    (run / "clients.csv").write_text("client,accuracy\n" + "".join(f"{i},{(i + 0.5) / 1e5}\n" for i in range(100_000)))
    assert len(page(run).source) < 2_000_000


# --- several runs -----------------------------------------------------------------------------------------


def test_seeds_are_one_row_and_every_run_has_a_line(tmp_path: Path) -> None:
    runs = [example(tmp_path / f"{n}{s}", s, c) for n, c in (("a", AVG), ("p", PROX % 1)) for s in (1, 2, 3)]
    found = page(*runs)
    assert found.texts["h1"] == ["6 runs of 2 settings"]
    assert found.row("strategy=fedprox")[:3] == ["strategy=fedprox", "3", "78.31"]
    assert found.row("run")[0] == "run"
    differences = next(row for row in found.rows if row[:1] == ["run"] and "strategy" in row)
    assert differences == ["run", "strategy", "strategy.mu"]
    assert ["strategy=fedavg", "fedavg", "–"] in found.rows and ["strategy=fedprox", "fedprox", "1"] in found.rows
    lines = [row for row in found.rows if len(row) > 1 and row[1].startswith(tmp_path.name)]
    assert [row[3] for row in lines] == ["1", "2", "3"] * 2
    alt = found.all("img")[0]["alt"]
    assert alt.count("25.00 % to 78.31 %") == 2  # a line per row, not per run
    assert found.texts["summary"] == ["strategy=fedavg, seed 1", "strategy=fedprox, seed 1"]


def test_an_unfinished_run_stands_apart_and_is_never_best(tmp_path: Path) -> None:
    better = unfinished(tmp_path / "b", 2)
    (better / "metrics.jsonl").write_text(json.dumps(rounds([0.99])[0]) + "\n")
    found = page(example(tmp_path / "a", 1), example(tmp_path / "c", 1, PROX % 1), better)
    assert found.row("strategy=fedavg (unfinished)")[:3] == ["strategy=fedavg (unfinished)", "1", "99.00"]
    assert found.texts["span"] == ["1 of 3 not finished"]
    assert "99.00" not in found.texts["strong"] and "78.31" in found.texts["strong"]


def test_a_run_of_a_folder_without_a_round_is_left_out_and_named(tmp_path: Path) -> None:
    for seed in (1, 2):
        example(tmp_path / "sweep" / f"job{seed}", seed)
    unfinished(tmp_path / "sweep" / "on", 4)
    young = unfinished(tmp_path / "sweep" / "young", 3)
    (young / "metrics.jsonl").unlink()
    found = page(tmp_path / "sweep")
    assert found.texts["h1"] == ["3 runs of 2 settings"]  # that which has rounds is there
    assert f"Left out: {young} (no finished round)" in found.texts["p"]
    (single := tmp_path / "other" / "young").mkdir(parents=True)
    (single / "config.yaml").write_text((young / "config.yaml").read_text())
    example(tmp_path / "other" / "a")
    assert f"Left out: {single} (no finished round)" in page(tmp_path / "other").texts["p"]


def test_a_legend_stands_once_in_a_section_and_tells_equal_curves_apart(tmp_path: Path) -> None:
    found = page(*(example(tmp_path / f"r{i}", 1, PROX % i) for i in range(3)))
    assert len([u for u in found.all("ul") if u.get("class") == "legend"]) == 2  # curves, clients
    lines = [(a["stroke-width"], a.get("stroke-dasharray")) for a in found.all("line")][:3]
    assert lines[0] == ("4.0", None) and all(float(width) < 4 and dash for width, dash in lines[1:])
    assert lines[1] != lines[2] and len({a["d"] for a in found.all("path")}) == 3


def test_thirty_settings_have_thirty_different_lines(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"r{i}", 1, 0.5, f"{PROX % i}\n{DATA}", rounds([0.1, 0.5])) for i in range(30)]
    found = page(*runs)
    looks = [(a["stroke"], a.get("stroke-dasharray")) for a in found.all("line")]
    assert len(set(looks)) == 30
    assert "and 22 more" in found.all("img")[0]["alt"]


def test_the_page_of_several_runs_lies_in_their_deepest_common_folder(tmp_path: Path) -> None:
    a, b = example(tmp_path / "x" / "a"), example(tmp_path / "x" / "deep" / "b", 2)
    own = a / "report.html"
    own.write_text("mine")
    assert write_report([a, b]) == tmp_path / "x" / "report.html" and own.read_text() == "mine"
    assert write_report([a, b]) == tmp_path / "x" / "report.html"  # an earlier report is replaced
    inside = example(a / "again", 3)
    assert write_report([a, inside]) == a / "report-of-several.html" and own.read_text() == "mine"
    with pytest.raises(ConfigError, match=r"a/report\.html exists and is no report of fedsim"):
        write_report([a])
    assert write_report([tmp_path / "x" / "deep"]) == b / "report.html"


def test_a_folder_stands_for_the_runs_in_it(tmp_path: Path) -> None:
    for seed in (1, 2):
        example(tmp_path / "sweep" / f"job{seed}", seed)
    assert page(tmp_path / "sweep").texts["h1"] == ["2 runs of 1 setting"]


# --- the file ---------------------------------------------------------------------------------------------


def requests(found: Page) -> list[str]:
    """Everything that a browser would ask for."""
    asked = [
        f"{tag} {name}={value[:60]}"
        for tag, attributes in found.tags
        for name, value in attributes.items()
        if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background")
        and not value.startswith("data:")
    ]
    styles = found.texts.get("style", []) + [a["style"] for _, a in found.tags if "style" in a]
    asked += [f"style {hit}" for style in styles for hit in re.findall(r"@import|url\(\s*['\"]?(?!data:)[^)]*", style)]
    asked += [tag for tag, _ in found.tags if tag in ("script", "iframe", "object", "embed", "base")]
    for image in found.all("img"):
        if image["src"].startswith("data:image/svg"):
            text = base64.b64decode(image["src"].partition(",")[2]).decode()
            asked += re.findall(
                r"""(?:href|src)=["'](?!#|data:)[^"']*|url\((?!#)[^)]*|<script|<!DOCTYPE|@import""", text
            )
    return asked


def test_no_request_leaves_the_page(tmp_path: Path, real: Path) -> None:
    evil = AVG + "\nnote: '<img src=https://example.org/x.png><script src=//example.org></script>'"
    runs = [example(tmp_path / "a"), example(tmp_path / "b", 1, evil)]
    for found in (page(real, out=tmp_path / "real.html"), page(runs[1]), page(*runs)):
        assert requests(found) == []
        policy = next(m["content"] for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'; img-src data:;")
    assert "<img src=https://example.org/x.png>" in found.source.replace("&lt;", "<").replace("&gt;", ">")


def test_the_search_for_requests_finds_them(tmp_path: Path) -> None:
    (tmp_path / "x.html").write_text(
        '<style>@import "a.css"; p { background: url(b.png) }</style><script></script><img src="http://c"><a href="d">'
    )
    assert len(requests(Page(tmp_path / "x.html"))) == 5


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    runs = [example(tmp_path / "a"), example(tmp_path / "b", 2)]
    assert page(*runs, out=tmp_path / "1.html").source == page(*runs, out=tmp_path / "2.html").source


def test_tables_headings_and_language_are_there_for_a_screen_reader(tmp_path: Path) -> None:
    for found in (page(example(tmp_path / "a")), page(tmp_path / "a", example(tmp_path / "b", 1, PROX % 1))):
        assert found.all("html") == [{"lang": "en"}] and found.texts["title"][0].strip()
        levels = [int(tag[1]) for tag, _ in found.tags if tag in ("h1", "h2", "h3")]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))
        assert len(found.all("caption")) == len(found.all("table"))
        assert all(th.get("scope") in ("row", "col") for th in found.all("th"))


def test_the_driver_writes_the_report_that_the_command_writes(real: Path, tmp_path: Path) -> None:
    by_driver = (real / "report.html").read_text()
    assert write_report([real], tmp_path / "x.html").read_text() == by_driver
    assert "Classes of the clients" in by_driver and (real / "figures" / "partition.png").exists()
    assert (real / "log.txt").read_text().count("WARNING") == 0


def test_a_report_that_fails_costs_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim.experiment import simulate

    def broken(*_: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(html, "write_own_report", broken)
    run = simulate([*QUICK, f"run_dir={tmp_path}", "tracker=[]"]).run_dir
    assert read_summary(run)["rounds"] == 1 and not (run / "report.html").exists()
    assert "no fonts" in (run / "log.txt").read_text()


# --- what a user gets wrong -------------------------------------------------------------------------------


def test_a_report_on_the_command_line(fedsim: Fedsim, tmp_path: Path) -> None:
    example(tmp_path / "a")
    outcome = fedsim("report", "a", "out=page.html")
    assert (outcome.status, outcome.out, outcome.err) == (0, "page.html\n", "")
    example(tmp_path / "sweep" / "b", 2)
    example(tmp_path / "sweep" / "c", 3)
    assert fedsim("report", "sweep").out == "sweep/report.html\n"


@pytest.mark.parametrize(
    "args, says",
    [
        ([], "fedsim report needs a run directory"),
        (["nowhere"], "nowhere does not exist"),
        (["runn"], "did you mean 'run'"),
        (["empty"], "empty is not a run directory, and holds none"),
        (["foreign"], "foreign is not a fedsim run, and holds none: its config.yaml has no strategy and run_dir"),
        (["nowhere"], "needed is a run directory, such as runs/"),
        (["link"], "link is a link to gone, which does not exist; needed is a run directory"),
        (["run/metrics.jsonl"], "run/metrics.jsonl is a file; name its folder, run"),
        (["foreign/config.yaml"], "foreign/config.yaml is a file; needed is a run directory"),
        (["hopeless"], "no run to show; left out: hopeless/young (no finished round)"),
        (["run", "run"], "run is named twice"),
        (["run", "empty/../run"], "is named twice"),
        (["run", "twin"], "same experiment with the same seed 1"),
        (["run", "other_data"], "run and other_data are runs of different data (data=digits and data=Images)"),
        (["fresh"], "fresh has no finished round to report; go on with `fedsim resume=fresh`, or leave it out"),
        (["run", "fresh"], "fresh has no finished round"),
        (["no_seed"], "no_seed/config.yaml needs a whole number `seed`"),
        (["run", "out=empty"], "out=empty is a folder; name a file, such as out=empty/report.html"),
        (["run", "out=no/such/x.html"], "there is no folder no/such; make it first"),
        (["run", "out=run/config.yaml/x.html"], "there is no folder run/config.yaml"),
        (["run", "out=run/config.yaml"], "a report's name must end in .html, such as out=run/report.html"),
        (["run", "out=page"], "a report's name must end in .html, such as out=report.html"),
        (["run", "out=own.html"], "own.html exists and is no report of fedsim; move it away"),
        (["foreign", "run", "out=own.html"], "foreign is not a fedsim run"),
        (["run", "out="], "out= needs a value"),
        (["run", "out=a", "out=b"], "out= is given twice"),
        (["run", "format=pdf"], "has no option format="),
        (["run", "--open"], "unknown option '--open'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_slip_on_the_command_line_is_one_line(fedsim: Fedsim, tmp_path: Path, args: list[str], says: str) -> None:
    example(tmp_path / "run")
    example(tmp_path / "twin")
    make_run(tmp_path / "other_data", 2, 0.5, f"{AVG}\ndata: {{_target_: x.Images}}", rounds([0.5]))
    for name in ("fresh", "hopeless/young"):
        (make_run(tmp_path / name, 1, 0.5, records=[]) / "summary.json").unlink()
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "own.html").write_text('<!DOCTYPE html>\n<html lang="en">\n<title>My page</title></html>')
    (tmp_path / "empty").mkdir()
    for name, text in (("foreign", "a: 1"), ("no_seed", "rounds: 3\nstrategy: {}\nrun_dir: runs")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    (tmp_path / "no_seed" / "metrics.jsonl").write_text('{"round": 1}\n')
    before = contents(tmp_path)
    outcome = fedsim("report", *args)
    assert outcome.status == 2 and says in outcome.line and outcome.out == ""
    assert contents(tmp_path) == before  # nothing is left behind, nothing is overwritten


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("config.yaml", b"a: [", "config.yaml is damaged"),
        ("config.yaml", b"", "config.yaml is damaged"),
        ("summary.json", b"{", "summary.json is damaged"),
        ("summary.json", b"{}", "summary.json is damaged: it needs `final` and `rounds`"),
        ("summary.json", b'{"final": {}}', "summary.json is damaged: it needs `final` and `rounds`"),
        (
            "summary.json",
            b'{"final": {}, "rounds": 5, "totals": {"bytes_up": "many"}}',
            "`totals.bytes_up` must be a number, got 'many'",
        ),
        ("metrics.jsonl", b'{"round": 1}\n{\n{"round": 3}\n', "metrics.jsonl:2: damaged line"),
        ("metrics.jsonl", b'{"round": 1, "bytes_up": []}\n', "`bytes_up` must be a number"),
        ("metrics.jsonl", b'{"round": 1, "staleness": [1]}\n', "`staleness` must be a table of whole numbers"),
        ("metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl is damaged: it holds no round, but 5 were done"),
        ("metrics.jsonl", b"", "metrics.jsonl is damaged: it holds no round, but 5 were done"),
        ("metrics.jsonl", b'{"round": 1}\n{"round": 2}\n', "it ends with round 2, but 5 were done (summary.json)"),
        ("metrics.jsonl", b'{"round": 6}\n', "it ends with round 6, but 5 were done (summary.json)"),
        ("metrics.jsonl", None, "metrics.jsonl is missing, though the run is finished; restore it"),
        ("clients.csv", b"", "clients.csv is damaged (it has no rows)"),
        ("clients.csv", b"client,accuracy\n", "clients.csv is damaged (it has no rows)"),
        ("clients.csv", b"client,accuracy\n0,0.5\n1,1.0\n", "the mean of `accuracy` is 0.75, summary.json says 0.5"),
        ("clients.csv", b"client,loss\n0,0.5\n", "the mean of `accuracy` is nan, summary.json says 0.5"),
        ("classes.csv", b"", "classes.csv is damaged (it has no rows)"),
        ("classes.csv", b"class,accuracy\n0,0.5\n", "it has 1 rows, but there are 2 classes"),
        ("classes.csv", b"class,name\n0,a\n1,b\n", "classes.csv is damaged (it has no column `accuracy`)"),
        ("clients.csv", b"client,accuracy\n0,high\n", "line 2: `accuracy` must be a number, got 'high'"),
        ("clients.csv", b"client,accuracy\n0\n", "line 2 has 1 values, the header 2"),
        ("clients.csv", b"\xff", "clients.csv is damaged"),
        ("classes.csv", b"class,accuracy\n0,high\n", "classes.csv is damaged"),
        ("partition.npz", b"PK", "partition.npz is damaged"),
        ("partition.npz", b"", "partition.npz is damaged"),
    ],
)
def test_a_damaged_file_is_said(fedsim: Fedsim, tmp_path: Path, file: str, content: bytes | None, says: str) -> None:
    path = example(tmp_path / "run") / file
    path.unlink() if content is None else path.write_bytes(content)
    outcome = fedsim("report", "run")
    assert outcome.status == 2 and says in outcome.line and "run" in outcome.line


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder in which nobody, root included, may write")
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    example(tmp_path / "run")
    outcome = process("report", "run", "out=/proc/report.html", cwd=tmp_path)  # pytest would catch what is logged
    assert outcome.status == 2 and outcome.line.startswith("fedsim: cannot write /proc/report.html: ")
    # One remedy, not also that for a run that cannot be written.
    assert outcome.line.endswith("; out=<file>.html puts the report elsewhere") and outcome.line.count(";") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(fedsim: Fedsim, tmp_path: Path) -> None:
    run = example(tmp_path / "run")
    run.chmod(0o555)
    outcome = fedsim("report", "run")
    run.chmod(0o755)
    assert outcome.status == 2 and "out=<file>.html puts the report elsewhere" in outcome.line


def test_a_config_of_another_run_is_refused(fedsim: Fedsim, real: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(real, copy)
    assert fedsim("report", "copy").status == 0  # the hash is that of the file as it is read back
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("seed: 0", "seed: 7"))
    for command in ("report", "compare"):
        outcome = fedsim(command, "copy")
        assert outcome.status == 2 and "copy/config.yaml is not the config of this run" in outcome.line
    (copy / "config.yaml").write_text("strategy: {}\nrun_dir: runs\nseed: 0\n")
    assert "is not the config of this run" in fedsim("report", "copy").line


def test_python_callers_get_the_same_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one run directory"):
        write_report([])


def test_only_one_run_of_a_real_folder_is_its_own_page(real: Path) -> None:
    assert only_run(real.parents[1]) == real
    assert write_report([real.parents[1]]) == real / "report.html"
