"""okd.page: one file of valid HTML, from runs that are whole, cut short, or several; numbers read back from it."""

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
import yaml
from markupsafe import Markup

from okd import curves
from okd.page import page, write_page
from okd.report import read_run

VOID = {"meta", "br", "path", "use"}
SCRIPT = "<script>alert('x')</script> & so on"
BEFORE = {"forward_kl": 1.25, "perplexity": 90.0, "top1_agreement": 0.4, "rouge_l": 10.0, "forward_kl_easy": 0.5}
AFTER = {"forward_kl": 0.75, "perplexity": 45.0, "top1_agreement": 0.5, "rouge_l": 20.0, "forward_kl_easy": 0.25}


class Parser(HTMLParser):
    """Text by element; fails where tags are not balanced, or an id comes twice."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.tags, self.links, self.text = [], set(), [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        assert len(found) == len(attributes), (tag, attributes)
        if "id" in found:
            assert found["id"] not in self.ids
            self.ids.add(found["id"])
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(text):
    parser = Parser()
    parser.feed(text)
    parser.close()
    assert parser.open == [] and text.startswith("<!doctype html>")
    assert all(link.startswith("#") and link[1:] in parser.ids for link in parser.links), "nothing from elsewhere"
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= parser.ids
    return parser


@pytest.fixture
def plain(monkeypatch):
    """Without curves, which take most of the time."""
    monkeypatch.setattr(curves, "svg", lambda lines, name, title: Markup("<svg></svg>"))


def entry(step, **more):
    value = 1 + 1 / (1 + step)
    return {"step": step, "student_loss": value, "teacher_loss": 2 * value, "base_forward_kl": value / 2, **more}


def a_run(path, method="okd", seed=0, steps=30, after=AFTER, **options):
    path.mkdir(parents=True, exist_ok=True)
    configuration = {"method": method, "seed": seed, "output_dir": str(path), "student": "a/small", **options}
    (path / "config.yaml").write_text(yaml.safe_dump(configuration))
    log = [entry(i, tokens_per_second=100.0 + seed, teacher_shift=0.1, learning_rate=1e-3) for i in range(steps)]
    (path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    (path / "before.json").write_text(json.dumps([BEFORE, []]))
    sample = {"id": "a", "prompt": SCRIPT, "reference": SCRIPT, "teacher": SCRIPT}
    sample |= {"before": {"answer": SCRIPT, "tokens": None}}
    sample |= {"after": {"answer": "no", "tokens": [[SCRIPT, 0.0], [" so", math.log(2)], ["■", -1e-9]]}}
    record = {
        "summary": "online KD",
        "machine": {"device": "a CPU", "cores": 2, "memory": 8 * 2**30},
        "parameters": {"student": 1234567},
        "options": {"learning_rate": 1e-3},
        "seconds": {"backward": 30.0, "loading": 10.0, "optimizer": 0.01},
        "memory": {"measured": 3 * 2**30, "planned": 2 * 2**30},
        "samples": [sample],
        "warnings": [[SCRIPT, 3]],
    }
    (path / "report.json").write_text(json.dumps(record))
    figures = {
        "before": BEFORE,
        "after": after,
        "method": method,
        "steps": steps,
        "seconds": {"training": 40, "all": 50},
    }
    (path / "metrics.json").write_text(json.dumps(figures))
    return path


def test_a_run_in_one_file(tmp_path):
    folder = a_run(tmp_path / "run")
    write_page([folder], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    found = parsed(text)
    said = "".join(found.text)
    for expected in (
        *("okd · online KD · 30 steps in 50 s", "1.2500 → 0.7500", "×0.60", "40.0 → 50.0", "+10.0 pts", "a/small"),
        *("student 1,234,567", "device a CPU, cores 2, memory 8 GiB", "backward30.0 s · 75 %", "loading10.0 s · 25 %"),
        *("Highest memory 3.0 GiB", "had said 2.0 GiB", "(3 times)", "easy, before", "learning_rate"),
    ):
        assert expected in said, expected
    assert "0.5000" in said and "0.2500" in said, "easy tokens"
    assert "optimizer" not in said, "less than a tenth of a second"
    assert found.tags.count("svg") == 6 and "script" not in found.tags


def test_texts_of_models_are_no_html(tmp_path, plain):
    text = page([read_run(a_run(tmp_path / "run"))])
    assert "<script>" not in text
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; so on") == 6


def test_tokens_are_coloured_by_their_divergence(tmp_path, plain):
    text = page([read_run(a_run(tmp_path / "run"))])
    found = re.findall(r'<b class="k" title="([^"]*)" style="--k: ([^"]*)">([^<]*)</b>', text)
    assert [(nats, heat) for nats, heat, _ in found] == [
        ("0.00 nats", "0.00"),
        ("0.69 nats", "0.50"),
        ("-0.00 nats", "0.00"),
    ]
    assert found[1][2] == " so"


@pytest.mark.parametrize(
    "missing", [("metrics.json",), ("metrics.json", "report.json"), ("report.json", "before.json")]
)
def test_what_is_there_is_shown(tmp_path, plain, missing):
    """Of a run that was killed, and of one by an earlier version."""
    folder = a_run(tmp_path / "run")
    for name in missing:
        (folder / name).unlink()
    said = "".join(parsed(page([read_run(folder)])).text)
    assert ("not finished: 29 steps logged" in said) == ("metrics.json" in missing)
    assert ("Answers side by side" in said) == ("report.json" not in missing)
    assert "1.2500" in said and "a/small" in said and "Losses" in said


def test_a_log_alone_is_enough(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps(entry(1)))
    assert "Losses" in "".join(parsed(page([read_run(tmp_path)])).text)


def test_seeds_of_one_configuration_have_a_mean_and_a_deviation(tmp_path, plain):
    runs = [
        read_run(a_run(tmp_path / str(i), seed=i, after={"forward_kl": kl, "rouge_l": 12.5, "rouge_l_std": 9.0}))
        for i, kl in enumerate((0.5, 0.75, 1.0))
    ]
    said = "".join(parsed(page(runs)).text)
    assert "1.2500 ± 0.0000 → 0.7500 ± 0.2500" in said and "12.5 ± 0.0" in said and "3 runs that differ" in said
    assert "12.5 ± 9.0" in "".join(parsed(page(runs[:1])).text), "over seeds of its answers"


def test_a_mean_over_seeds_takes_what_is_not_finite_or_not_there(tmp_path, plain):
    """A perplexity may be infinite, and one run may have been stopped before it had any answers."""
    found = {"perplexity": math.inf, "rouge_l": 1.0, "rouge_l_std": 7.0}, {"perplexity": 2.0}
    runs = [read_run(a_run(tmp_path / str(i), seed=i, after=after)) for i, after in enumerate(found[::-1])]
    said = "".join(parsed(page(runs)).text)
    assert "90.00 ± 0.00 → inf" in said and "inf ±" not in said and "1.0 ± 7.0" in said


def test_configurations_beside_one_another(tmp_path, plain):
    runs = [read_run(a_run(tmp_path / f"okd{i}", seed=i, after={"forward_kl": 0.5 + i})) for i in range(2)]
    runs.append(read_run(a_run(tmp_path / "kd", method="forward_kd", after={"forward_kl": 0.25}, temperature=2.0)))
    found = parsed(page(runs))
    said = re.sub(r"\s+", " ", " ".join(found.text))
    assert "okd and forward_kd" in said and "3 runs of 2 configurations" in said
    assert "■ okd 1.0000 ± 0.7071 40 100 2" in said and "■ forward_kd 0.2500 40 100 1" in said
    assert "temperature default 2.0" in said and "method okd forward_kd" in said
    assert "Losses: student" in said and "Losses: teacher's online module" in said


def test_configurations_answer_side_by_side(tmp_path, plain):
    """The prompts that two students have answered, and a teacher that is the same for all."""
    runs = [read_run(a_run(tmp_path / method, method=method)) for method in ("okd", "jsd", "sft")]
    for run, text in zip(runs, ("one", "two", "three"), strict=True):
        (sample,) = run.samples
        sample["after"] = {"answer": text, "tokens": [[text, 1.0]] if text == "one" else None}
    del runs[2].samples[0]["after"]
    said = re.sub(r"\s+", " ", " ".join(parsed(page(runs)).text))
    assert "Answers side by side Each token of a student" in said
    assert f"{SCRIPT} Teacher {SCRIPT} ■ okd one ■ jsd two Reference" in said and "three" not in said
    runs[1].samples[0]["teacher"] = "another"
    assert "Teacher" not in page(runs).split("Answers side by side")[1]
    runs[1].samples[0]["prompt"] = "another"
    assert "Answers side by side" not in page(runs)


@pytest.mark.parametrize(("methods", "names"), [(("okd", "jsd"), ["okd", "jsd"]), (("okd", "okd"), ["a", "b"])])
def test_configurations_are_named_by_what_tells_them_apart(tmp_path, methods, names):
    from okd.page import grouped

    runs = [
        read_run(a_run(tmp_path / n, method=m, temperature=t)) for n, m, t in zip("ab", methods, (1, 2), strict=True)
    ]
    assert list(grouped(runs)) == names


@pytest.mark.parametrize("count", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_long_runs_are_below_a_megabyte(tmp_path, count):
    runs = []
    for i in range(count):
        folder = a_run(tmp_path / str(i), method=f"m{i}", steps=3000)
        record = json.loads((folder / "report.json").read_text())
        long = {"answer": "word " * 4000, "tokens": [[" wordy", 1.234567]] * 4000}
        texts = {"prompt": "p" * 10**5, "reference": "r" * 10**5, "teacher": "t" * 10**5}
        record["samples"] = [{"id": "a", **texts, "before": long, "after": long}] * 6
        (folder / "report.json").write_text(json.dumps(record))
        runs.append(read_run(folder))
    assert len(page(runs).encode()) < 10**6


def test_thin_curves_keep_their_ends_and_their_mean():
    points = [(float(i), float(i % 2)) for i in range(10002)]
    found = curves.thinned(points, 502)
    assert len(found) == 502 and (found[0], found[-1]) == (points[0], points[-1])
    assert found[1] == (10.5, 0.5) and curves.thinned(points[:7], 7) == points[:7]


def test_axes_begin_at_zero_and_colours_are_the_pages(tmp_path):
    text = curves.svg([curves.Line("a", curves.TEACHER, True, [(1, 2.0), (3, 4.0)])], "p", "a < b")
    assert 'aria-label="a &lt; b"' in text and "stroke: var(--c02)" in text and not re.search(r"#0000\d\d", text)
    assert ">0</text>" in text or ">0.0</text>" in text
    assert len(re.findall("<use [^>]*var\(--c02\)", text)) == 2, "a mark at each evaluation"


def test_the_callers_matplotlib_is_left_alone():
    import matplotlib

    before, loaded = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    curves.svg([curves.Line("a", 1, False, [(1, 2.0)])], "p", "t")
    assert dict(matplotlib.rcParams) == before and ("matplotlib.pyplot" in sys.modules) == loaded


def test_a_page_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    folder = a_run(tmp_path / "run")
    (folder / "report.html").write_text("old")
    monkeypatch.setattr("okd.durable.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        write_page([folder], folder / "report.html")
    assert (folder / "report.html").read_text() == "old"
