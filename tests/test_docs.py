"""README and docs: links resolve, blocks compile, commands exist, and figures are those of the results files."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qwen_longctx import LongContextConfig
from qwen_longctx.cli import main
from qwen_longctx.evaluation.summary import Estimate, summarize

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
OURS = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*OURS, ROOT / "benchmarks" / "README.md", ROOT / "CHANGELOG.md"]
PRIVATE_WORDS = re.compile(r"\b(meets|mine|turned)\b", re.IGNORECASE)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

documents = pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)


def prose(path: Path) -> str:
    """A document without its fenced blocks and inline code, which hold no links or headings."""
    return re.sub(r"`[^`\n]*`", "code", FENCE.sub("", path.read_text()))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def fenced(path: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(path.read_text()) if name == language]


def tables(path: Path) -> list[list[list[str]]]:
    """Every table of a document: rows of cells, without the rule below the head."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", path.read_text(), re.MULTILINE):
        rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found.append([rows[0], *rows[2:]])
    return found


def rows_of(*names: str) -> list[dict]:
    return [row for name in names for row in json.loads((RESULTS / name).read_text())["rows"]]


def number(cell: str) -> float:
    return float(cell.replace(",", "").removesuffix("%").strip())


def agrees(cell: str, value: float) -> bool:
    """Whether a cell is `value`, rounded to the digits that the cell shows; a percentage stands for a share."""
    shown = re.sub(r"[^\d.]", "", cell)
    exact = value * 100 if cell.endswith("%") else value
    digits = len(shown.partition(".")[2])
    return abs(number(cell) - exact) <= 0.5 * 10**-digits + 1e-9


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_anchors_resolve(path):
    for target in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        assert place.exists(), f"{path.name} links to {target}, which does not exist"
        assert ROOT in (place, *place.parents), f"{path.name} links to {target}, outside of the repository"
        if anchor:
            assert anchor in anchors(place), f"{path.name} links to {target}: no heading has this anchor"


def test_docs_are_reachable_from_the_readme():
    reached = {(ROOT / target.partition("#")[0]).resolve() for target in LINK.findall(prose(README))}
    assert {path for path in OURS if path != README} <= reached


def test_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    assert sum(line.startswith("![") for line in lines) == 1


@documents
def test_no_private_words(path):
    assert not PRIVATE_WORDS.findall(path.read_text())


@documents
def test_python_blocks_compile(path):
    for text in fenced(path, "python"):
        compile(text, path.name, "exec")


@documents
def test_fences_are_closed(path):
    assert sum(line.startswith("```") for line in path.read_text().splitlines()) % 2 == 0


def help_of(words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0, f"qwen-longctx {' '.join(words)} is no command"
    return capsys.readouterr().out


def shown_commands(path: Path) -> list[list[str]]:
    """Arguments of every ``qwen-longctx NAME …`` in shell blocks and inline code."""
    text = path.read_text()
    lines = [line for name, block in FENCE.findall(text) if name == "bash" for line in block.splitlines()]
    lines += re.findall(r"`([^`]+)`", FENCE.sub("", text))
    calls = [shlex.split(line.partition("qwen-longctx ")[2]) for line in lines if "qwen-longctx " in line]
    return [call for call in calls if call[0] != "NAME"]


@pytest.mark.parametrize("path", [*OURS, ROOT / "benchmarks" / "README.md"], ids=lambda path: path.parent.name)
def test_commands_and_options_exist(path, capsys):
    commands = re.search(r"\{([\w,-]+)\}", help_of([], capsys)).group(1).split(",")
    for call in shown_commands(path):
        assert call[0] in commands, f"{path.name} shows qwen-longctx {call[0]}"
        known = set(re.findall(r"--[\w-]+", help_of(call[:1], capsys)))
        options = {word for word in call[1:] if word.startswith("--")}
        assert options <= known, f"{path.name} shows qwen-longctx {call[0]} with {options - known}"


def test_command_line_page_is_complete(capsys):
    """Every command has its section, and every option is named there or among the shared ones."""
    text = (ROOT / "docs" / "command-line.md").read_text()
    head, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    by_name = {section.partition("\n")[0]: section for section in sections}
    commands = re.search(r"\{([\w,-]+)\}", help_of([], capsys)).group(1).split(",")
    assert sorted(by_name) == sorted(commands)
    for name in commands:
        known = set(re.findall(r"--[\w-]+", help_of([name], capsys))) - {"--help"}
        missing = {option for option in known if option not in by_name[name] and f"`{option}`" not in head}
        assert not missing, f"docs/command-line.md, {name}: {missing}"


def test_settings_page_has_every_setting_and_default():
    rows = {row[0].strip("`"): row for table in tables(ROOT / "docs" / "settings.md") for row in table[1:]}
    settings = {field.name: field.default for field in fields(LongContextConfig)}
    shown = {name: row[1] for name, row in rows.items() if len(row) == 3}
    assert set(shown) == set(settings)
    for name, default in settings.items():
        if isinstance(default, (bool, int, str)):
            assert json.dumps(default) in shown[name] or f"`{default}`" in shown[name], (name, default)


SPEED_ROWS = {
    "stock transformers, SDPA": "stock_seconds",
    "patched, dense": "dense_seconds",
    "dense, exact": "dense_seconds",
    "patched, sparse": "sparse_seconds",
    "sparse": "sparse_seconds",
    "dense over sparse": "dense_over_sparse",
    "blocks kept by sparse": "density",
    "blocks kept": "density",
    "selection, of the time": "selection_share",
}


@pytest.mark.parametrize("path", [README, ROOT / "docs" / "performance.md"], ids=lambda path: path.name)
def test_speed_figures(path):
    measured = {row["tokens"]: row for row in rows_of("speed_h200.json")}
    earlier = {row["tokens"]: row for row in rows_of("speed.json")}
    (table,) = (t for t in tables(path) if t[0][0] == "tokens" and any(row[0] == "dense over sparse" for row in t))
    lengths = [int(number(cell)) for cell in table[0][1:]]
    assert sorted(measured) == lengths
    checked = 0
    for label, *cells in table[1:]:
        source, key = measured, SPEED_ROWS.get(label)
        if label.startswith("sparse on an H100"):
            source, key = earlier, "sparse_seconds"
        elif label == "its blocks kept":
            source, key = earlier, "density"
        assert key is not None, label
        for tokens, cell in zip(lengths, cells, strict=True):
            assert bool(cell) == (key in source[tokens]), (label, tokens)
            if cell:
                assert agrees(cell, source[tokens][key]), (label, tokens, cell, source[tokens][key])
                checked += 1
    assert checked >= 28


@pytest.mark.parametrize("path", [README, ROOT / "docs" / "performance.md"], ids=lambda path: path.name)
def test_projected_figures_are_marked(path):
    measured = {row["tokens"]: row for row in rows_of("speed_h200.json")}
    projected = ["projected" in measured[tokens]["dense_is"] for tokens in sorted(measured)]
    lines = re.findall(
        r"^\| (?:dense over sparse|patched, dense|dense, exact) \|(.*)\|$", path.read_text(), re.MULTILINE
    )
    marked = [[cell.strip().endswith("*") for cell in line.split("|")] for line in lines]
    assert [row for row in marked if len(row) == len(projected)] == [projected] * 2


def test_quality_figures():
    rows = rows_of(
        "quality.json",
        "quality_middle.json",
        "quality_524288.json",
        "quality_524288_torch.json",
        "quality_1000000.json",
    )
    measured = {(row["tokens"], row["package"], row["variant"]): row for row in rows}
    (table,) = (t for t in tables(ROOT / "docs" / "sparse-prefill.md") if "dense NLL" in t[0])
    tokens = 0
    for length, package, dense, nll, agreement, kl, density, recall, _ in table[1:]:
        tokens = int(number(length)) if length else tokens
        row = measured[tokens, package, "block_scores"]
        assert agrees(dense, measured[tokens, package, "dense"]["nll"]), (tokens, package)
        mean, worst = recall.split(", ")
        for cell, key in (
            (nll, "nll"),
            (agreement, "agreement"),
            (kl, "kl"),
            (density, "density"),
            (mean, "recall"),
            (worst, "lowest_recall"),
        ):
            assert agrees(cell, row[key]), (tokens, package, key, cell, row[key])
    assert len(table) == 17


def signed(value: float, digits: int = 3) -> str:
    """As the tables of differences show it."""
    return f"{value:+.{digits}f}".replace("-", "−") if round(value, digits) else f"{0:.{digits}f}"


def with_interval(estimate: Estimate, scale: int = 1, digits: int = 3) -> str:
    return f"{signed(scale * estimate.mean, digits)} ± {scale * estimate.half:.{digits}f}"


QUALITY = ROOT / "docs" / "quality.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
BEYOND = (65_536, 131_072)
NEEDLES = ("multi_needle", "needles_one_of_many", "needles_chain", "infinitebench_kv")


def evaluated(*names: str) -> list[dict]:
    return rows_of(*(f"eval/{name}.json" for name in names))


@pytest.fixture(scope="module")
def main_rows() -> list[dict]:
    groups = ("niah_single", "niah_multi", "ruler", "aa_lcr", "texts")
    return evaluated(*(f"{group}_{length}" for length in (16_384, 32_768, *BEYOND, 262_144) for group in groups))


@pytest.fixture(scope="module")
def main_lines(main_rows: list[dict]) -> dict:
    return {(line.task, line.length, line.mode): line for line in summarize(main_rows)}


def table_of(*head: str) -> list[list[str]]:
    (found,) = (t for t in tables(QUALITY) if t[0][: len(head)] == list(head))
    return found[1:]


def kept(rows: list[dict], task: str, length: int, mode: str = "block_scores") -> float:
    return mean(r["density"] for r in rows if (r["task"], r["length"], r["mode"]) == (task, length, mode))


def test_quality_by_length(main_lines):
    table = table_of("tokens", "mode")
    for length, mode, ruler, ruler_nll, lcr, text in table:
        of = {group: main_lines[group, int(number(length)), mode.strip("`")] for group in ("ruler_*", "aa_*", "text_*")}
        score = of["ruler_*"].score
        assert ruler == f"{100 * score.mean:.1f} ± {100 * score.half:.1f}", (length, mode)
        assert [ruler_nll, lcr, text] == [f"{one.nll.mean:.3f}" for one in of.values()], (length, mode)
    assert len(table) == 20


def test_quality_of_sparse_prefill(main_rows, main_lines):
    """The differences from dense attention, and what page and README.md say of them."""
    page, readme = QUALITY.read_text(), README.read_text()
    table, over = table_of("task", "65,536: points"), {}
    for name, *cells in table:
        lines = [main_lines[name.strip("`"), length, "block_scores"] for length in BEYOND]
        wanted = [(signed(100 * x.score_over_base.mean, 1), with_interval(x.nll_over_base)) for x in lines]
        assert cells == [cell for pair in wanted for cell in pair], name
        over[name.strip("`")] = lines
    assert len(table) == 16
    means = [line.score_over_base for line in over.pop("ruler_*")]
    assert "held: {} and {} points".format(*(with_interval(one, 100, 1) for one in means)) in page
    changes = " and ".join(with_interval(one, 100, 1) for one in means)
    assert f"RULER by {changes} points against dense attention" in re.sub(r"\s+", " ", readme)
    missed = {
        name: (line.score_over_base.mean, line.nll_over_base.mean) for name, (_, line) in over.items()
    }  # at 131,072
    assert {name for name, (score, _) in missed.items() if score < -0.05} == {"ruler_fwe", "ruler_niah_multivalue"}
    assert {name for name, (_, nll) in missed.items() if nll > 0.05} == {"ruler_qa_squad", "aa_lcr"}
    assert min(line.score_over_base.mean for line, _ in over.values()) >= -0.05
    assert max(line.nll_over_base.mean for line, _ in over.values()) <= 0.05

    before = {(x.task, x.length): x for x in summarize(evaluated("texts_before")) if x.mode == "sparse"}
    table = table_of("text", "65,536")
    for name, *cells in table:
        texts = [main_lines[name.strip("`"), length, "block_scores"] for length in BEYOND]
        texts += [before[name.strip("`"), length] for length in BEYOND]
        assert cells == [signed(line.nll_over_base.mean) for line in texts], name
    assert len(table) == 14
    names = [name.strip("`") for name, *_ in table[1:]]
    worst = max(main_lines[name, n, "block_scores"].nll_over_base.mean for name in names for n in BEYOND)
    assert f"at most {worst:.3f} nats" in readme and f"worst +{worst:.3f}" in page
    shares = [100 * kept(main_rows, name, 131_072) for name in names]
    assert f"{span(shares, '.0f')} % of the blocks of those" in readme
    for length in BEYOND:
        every = [100 * kept(main_rows, name, length) for name in (*names, *over)]
        assert f"{span(every, '.0f')} % of the blocks at {length:,}" in page or f"{span(every, '.0f')} % at" in page


def test_quality_of_needles():
    for length, others in ((65_536, 2), (131_072, 1)):
        rows = evaluated(f"needles_{length}")
        rows += [{**row, "mode": "before"} for row in evaluated(f"needles_{length}_before")]
        rows += evaluated("needles_65536_exact") if length == 65_536 else []
        modes = ["before", "block_scores", "block_scores:fidelity=careful", "exact_shares"][: 2 + others]
        over = {(line.task, line.mode): line.nll_over_base for line in summarize(rows)}
        (table,) = (t for t in tables(QUALITY) if t[0][:2] == ["task", "before"] and len(t[0]) == 1 + 2 * len(modes))
        for name, *cells in table[1:]:
            task, found = name.strip("`"), []
            for mode in modes:
                share = f"{kept(rows, task, length, mode):.1%}".replace("%", " %")
                found += [with_interval(over[task, mode]), share]
            assert cells == found, (name, length)
        assert [name.strip("`") for name, *_ in table[1:]] == list(NEEDLES)


def test_time_by_density():
    """Between the measured ends of speed_h200.json, in a straight line."""
    measured, seconds = {row["tokens"]: row for row in rows_of("speed_h200.json")}, {}
    table = table_of("", "131,072 tokens")
    for label, *cells in table:
        for length, cell in zip((131_072, 524_288, 1_000_000), cells, strict=True):
            row = measured[length]
            fast, dense, known = row["sparse_seconds"], row["dense_seconds"], row["density"]
            share = re.match(r"(\d+) %", label)
            density = int(share[1]) / 100 if share else 1.0 if label == "dense" else known
            found = fast + (dense - fast) * (density - known) / (1 - known)
            assert agrees(cell.removesuffix(" s"), found), (label, length, found)
            seconds[density, length] = cell
    assert len(table) == 4
    measured = {row["tokens"]: row for row in rows_of("speed_balanced.json", "speed_balanced_1000000.json")}
    times = [f"{measured[length]['sparse_seconds']:.1f}" for length in (131_072, 524_288, 1_000_000)]
    assert "{}, {} and {} seconds".format(*times) in QUALITY.read_text()
    calculated = [float(seconds[0.28, length].removesuffix(" s")) for length in measured]
    assert all(abs(x / float(y) - 1) < 0.03 for x, y in zip(calculated, times, strict=True))
    readme, dense = (
        re.sub(r"\s+", " ", README.read_text()),
        [measured[n]["dense_seconds"] for n in (131_072, 1_000_000)],
    )
    assert f"{times[0]} seconds there and {times[2]} at a million tokens" in readme
    assert f"dense attention takes {dense[0]:.1f} and {dense[1]:.0f}" in readme


def test_quality_at_eight_times_the_trained_length(main_rows, main_lines):
    page, length = QUALITY.read_text(), 262_144
    table, shares, points, answers, texts = table_of("task", "262,144: points"), [], {}, [], []
    for name, score, nll, share in table:
        task = name.strip("`")
        line = main_lines[task, length, "block_scores"]
        if share:
            shares.append(100 * kept(main_rows, task, length))
            assert share == f"{shares[-1]:.0f} %", task
        if task.startswith("text"):
            assert [score, nll] == ["", signed(line.nll_over_base.mean)], task
            texts.append(line.nll_over_base.mean)
        else:
            assert [score, nll] == [signed(100 * line.score_over_base.mean, 1), with_interval(line.nll_over_base)], task
            points[task] = 100 * line.score_over_base.mean
            answers.append(line.nll_over_base.mean)
    assert len(table) == 30 and f"{span(shares, '.0f')} % at {length:,}" in page
    assert [task for task, change in points.items() if change < -5] == ["ruler_vt"]
    assert f"`ruler_vt` is {signed(points['ruler_vt'], 1)}" in page and f"and +{max(texts):.3f} at 262,144" in page
    assert f"Held at 262,144 (worst +{max(answers):.3f})" in page and f"and {signed(points['ruler_*'], 1)} at" in page
    over = {line.task: line for line in summarize(main_rows, "yarn") if (line.mode, line.length) == ("dense", length)}
    text, answer = (over[group].nll_over_base.mean for group in ("text_*", "ruler_*"))
    assert f"dual chunk attention by {-text:.2f} nats and answers of RULER to YaRN by {answer:.2f}" in page


def test_more_samples_of_what_missed():
    tasks = ("aa_lcr", "ruler_fwe", "ruler_niah_multivalue", "ruler_qa_squad")
    rows = evaluated(*(f"more_{task}_131072" for task in tasks))
    lines = {line.task: line for line in summarize(rows) if line.mode == "block_scores"}
    for name, score, nll in table_of("task", "12 samples: points"):
        line = lines.pop(name.strip("`"))
        assert [score, nll] == [with_interval(line.score_over_base, 100, 1), with_interval(line.nll_over_base)], name
        assert sum(row["task"] == line.task for row in rows) == 24
    assert set(lines) <= {"aa_*", "ruler_*"}


def test_smaller_chunks(main_lines):
    (table,) = (t for t in tables(QUALITY) if t[0][:2] == ["mode", "`ruler_niah_single_2`"])
    tasks = [name.strip("`") for name in table[0][1:]]
    rows = [row for row in evaluated("geometry_131072") if row["task"] in tasks]
    lines = {(line.task, line.mode): line for line in summarize(rows)}
    for name, *cells in table[1:]:
        mode = name.strip("`")
        found = [main_lines[task, 131_072, mode] if mode == "yarn" else lines[task, mode] for task in tasks]
        assert cells == [f"{100 * line.score.mean:.0f}, {line.nll.mean:.3f}" for line in found], mode
        assert all(row["index"] < 4 for row in rows)
    assert len(rows) == 16 * 5 and len(table) == 7


def test_what_is_kept_far_beyond():
    modes = {
        "fast": "block_scores:fidelity=fast",
        "balanced": "block_scores",
        "careful": "block_scores:fidelity=careful",
    }
    table = table_of("fidelity", "524,288: blocks kept")
    for name, *cells in table:
        rows = [r for n in (524_288, 1_000_000) for r in evaluated(f"far_{n}") if r["mode"] == modes[name.strip('`"')]]
        assert cells == [cell for r in rows for cell in (f"{100 * r['density']:.1f} %", f"{r['nll']:.3f}")], name
    assert len(table) == 3


def test_pipeline_figures():
    """Seconds with chunks of equal time, and in brackets with chunks of equal length."""
    seconds = {}
    for row in rows_of("pipeline_simulation.json"):
        kind = "dense" if row["kind"] == "dense" else f"sparse, {row['density']:.0%}".replace("%", " %")
        seconds[f"{row['shape']}, {kind}", row["cards"], row["pipeline"]] = row["simulated_seconds"]
    (table,) = (table for table in tables(ROOT / "docs" / "several-devices.md") if table[0][1] == "one card")
    assert len(table) == 7
    for name, *cells in table[1:]:
        for cell, cards in zip(cells, (1, 2, 4, 8), strict=True):
            ways = ("auto", "equal") if cards > 1 else ("off",)
            for shown, way in zip(re.findall(r"[\d.]+", cell), ways, strict=True):
                assert agrees(shown, seconds[name, cards, way]), (name, cell)


def test_decode_figures():
    h100, h200 = (t[1:] for t in tables(PERFORMANCE) if t[0][0] == "tokens in the cache" and t[0][2] == "patched")
    for table, name in ((h200, "decode_h200.json"), (h100, "decode.json")):
        for (length, stock, ours, share, alone, eager), row in zip(table, rows_of(name), strict=True):
            assert number(length) == row["tokens"]
            assert stock == (f"{row['stock_ms']:.1f} ms" if "stock_ms" in row else ""), length
            assert ours == f"{row['patched_ms']:.1f} ms" and share == f"{100 * row['patched_share_of_bandwidth']:.0f} %"
            assert alone == f"{row['attention_pass_ms']:.1f} ms" and eager == f"{row['without_graphs_ms']:.1f} ms"
    said = f"decoded in {ours} on an H100, {share} of what reading weights and cache allows"
    assert said in re.sub(r"\s+", " ", README.read_text())


def test_decode_figures_of_other_caches():
    table = next(t for t in tables(PERFORMANCE) if t[0][:2] == ["tokens in the cache", "int8"])[1:]
    names = ("patched", "attention_pass", "sparse", "attention_sparse")
    for (length, *cells), row in zip(table, rows_of("decode_int8_h200.json"), strict=True):
        assert number(length) == row["tokens"] and cells == [f"{row[f'{name}_ms']:.1f} ms" for name in names]
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "sparse-decode.md").read_text())
    said = f"{cells[2].removesuffix(' ms')} with 5 % of the keys, {cells[0].removesuffix(' ms')} with all"
    assert said in page and f"{rows_of('decode_h200.json')[-1]['patched_ms']:.1f} with all of them in bf16" in page
    table = next(t for t in tables(PERFORMANCE) if t[0][:2] == ["tokens in the cache", "host"])[1:]
    for (length, *cells), row in zip(table, rows_of("decode_host_h200.json"), strict=True):
        assert number(length) == row["tokens"]
        assert cells == [f"{row['patched_ms']:.0f} ms", f"{row['sparse_ms']:.0f} ms"]


def test_quality_of_8_bits():
    def compared(name):
        return {(line.task, line.mode): line for line in summarize(rows_of(f"eval/{name}.json"), "dense")}

    cache, linear, ruler = map(compared, ("cache_texts_131072", "linear_texts_32768", "eight_bit_ruler_32768"))
    modes = ((cache, "dense:kv_cache=int8"), (cache, "dense:kv_cache=fp8"), (linear, "dense:linear=fp8"))
    texts = next(t for t in tables(QUALITY) if t[0][:2] == ["text", '`kv_cache="int8"`'])[1:]
    assert len(texts) == 14
    for name, *cells in texts:
        assert cells == [signed(lines[name.strip("`"), mode].nll_over_base.mean) for lines, mode in modes], name
    points, nll = next(t for t in tables(QUALITY) if t[0][:2] == ["RULER", '`kv_cache="int8"`'])[1:]
    of = [ruler["ruler_*", mode] for mode in ("dense:kv_cache=int8", "dense:linear=fp8")]
    assert points[1:] == [with_interval(one.score_over_base, 100, 1) for one in of]
    assert nll[1:] == [with_interval(one.nll_over_base) for one in of]
    for kind in ("int8", "fp8"):
        found = json.loads((RESULTS / f"passkey_{kind}.json").read_text())["records"]
        assert [one["correct"] for one in found] == [True] * 5


def test_quality_of_sparse_decode():
    rows = rows_of("eval/sparse_decode_1_131072.json", "eval/sparse_decode_2_131072.json")
    lines = {(line.task, line.mode): line for line in summarize(rows, "dense")}
    modes = [f"dense:sparse_decode={share},sparse_decode_threshold=1" for share in (0.05, 0.2)]
    (table,) = (t for t in tables(ROOT / "docs" / "sparse-decode.md") if t[0][0] == "task")
    assert len(table) == 15
    for name, *cells in table[1:]:
        over = [lines[name.strip("`"), mode] for mode in modes]
        wanted = [(signed(100 * one.score_over_base.mean, 1), signed(one.nll_over_base.mean)) for one in over]
        assert cells == [cell for pair in wanted for cell in pair], name


def test_vllm_figures():
    rows = {(row["engine"], row["tokens"]): row for row in rows_of("vllm.json")}
    table = next(t for t in tables(ROOT / "docs" / "serving.md") if t[0][0] == "prompt, tokens")[1:]
    for length, *cells in table:
        both = [rows[engine, int(number(length))] for engine in ("vllm", "transformers")]
        assert {row["prefill"] for row in both} == {"dense"}  # the sparse ones compare unlike things
        assert cells == [
            *(f"{row['first_token_seconds']:.1f} s" for row in both),
            *(f"{row['token_ms']:.1f} ms" for row in both),
        ]
    assert len(table) == 2


LONG_ADAPTER = ROOT / "benchmarks" / "adapters" / "qwen2.5-coder-0.5b-128k"
GROUPS = ("niah_single", "niah_multi", "ruler", "texts")


def before_and_after(length: int) -> tuple[list[dict], list[dict]]:
    """Rows of the same samples of the checkpoint as it was, and of the trained one."""
    whole = ("all_ruler", "texts")
    new = evaluated(*(f"trained_{group}_{length}" for group in (whole if length < 65_536 else GROUPS)))
    old = evaluated(*(f"{group}_{length}" for group in (whole if length == 4096 else GROUPS)))
    done = {(row["task"], row["index"]): row["fingerprint"] for row in new if row["mode"] == "dense"}
    same = [row for row in old if (row["task"], row["index"]) in done]
    assert all(row["fingerprint"] == done[row["task"], row["index"]] for row in same)
    return same, new


def test_training_figures():
    page = ROOT / "docs" / "training.md"
    table = next(t for t in tables(page) if t[0][:2] == ["tokens", "RULER, points"])[1:]
    for length, *cells in table:
        old, new = before_and_after(int(number(length)))
        trained = [{**row, "mode": "trained"} for row in new if row["mode"] == "dense"]
        lines = {(line.task, line.mode): line for line in summarize(old + trained)}
        (ruler, after), (texts, texts_after) = (
            [lines[group, mode] for mode in ("dense", "trained")] for group in ("ruler_*", "text_*")
        )
        assert cells == [
            *(f"{100 * line.score.mean:.1f}" for line in (ruler, after)),
            with_interval(after.score_over_base, 100, 1),
            *(f"{line.nll.mean:.3f}" for line in (ruler, after)),
            with_interval(after.nll_over_base),
            *(f"{line.nll.mean:.3f}" for line in (texts, texts_after)),
        ], length
        if length == "65,536":
            assert f"scores {100 * lines['ruler_*', 'yarn'].score.mean:.1f} points" in page.read_text()
    assert len(table) == 4
    yarn = lines["ruler_*", "yarn"]  # of the last length
    assert f"and {100 * yarn.score.mean:.1f} at 131,072" in page.read_text()
    assert f"(answer NLL {yarn.nll.mean:.3f}, and {after.nll.mean:.3f} after training)" in page.read_text()


def test_sparse_prefill_of_the_trained_checkpoint():
    table = next(t for t in tables(ROOT / "docs" / "training.md") if t[0][:2] == ["tokens", "blocks kept"])[1:]
    for length, share, *cells in table:
        rows = before_and_after(int(number(length)))[1]
        lines = {(line.task, line.mode): line for line in summarize(rows)}
        ruler, texts = (lines[group, "block_scores"] for group in ("ruler_*", "text_*"))
        wanted = ruler.score_over_base, ruler.nll_over_base, texts.nll_over_base
        assert cells == [with_interval(wanted[0], 100, 1), *(with_interval(one) for one in wanted[1:])], length
        densities = [row["density"] for row in rows if row["mode"] == "block_scores"]
        assert share == f"{100 * mean(densities):.0f} %"
    assert len(table) == 2


def test_training_run():
    """What the page says of the run, and that the adapter is what it made."""
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "training.md").read_text())
    folder = ROOT / "benchmarks" / "results" / "training"
    curve = json.loads((folder / "32k_to_128k_loss.json").read_text())
    before, after = curve["before"], curve["after"]
    assert all(new["loss"] < old["loss"] for old, new in zip(before, after, strict=True))
    ends = [f"from {before[i]['loss']:.3f} to {after[i]['loss']:.3f} in the" for i in (0, -1)]
    assert f"{ends[0]} first 8,192 tokens, {ends[1]} last" in page
    first, *steps = map(json.loads, (folder / "32k_to_128k.jsonl").read_text().splitlines())
    assert first["environment"]["gpus"][0]["name"] == "NVIDIA H200" and f"{len(steps)} steps of one sequence" in page
    assert sum(step["tokens"] for step in steps) == 24 * 131_072
    weights = LONG_ADAPTER / "adapter_model.safetensors"
    assert f"adapters of {weights.stat().st_size / 1e6:.1f} MB" in page
    tensors = load_file(weights)
    assert sum(x.numel() for x in tensors.values()) == first["learned_parameters"]
    assert all(x.isfinite().all() for x in tensors.values())
    config = json.loads((LONG_ADAPTER / "config.json").read_text())
    assert config["dual_chunk_attention_config"]["chunk_size"] == config["max_position_embeddings"] == 131_072


def test_runs_at_the_edge_of_memory():
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "memory.md").read_text())
    plans = []
    for name in ("memory_48gb_h200", "memory_14b_h200"):
        (row,) = rows_of(f"{name}.json")
        assert f"{row['peak_bytes'] / 1e9:.1f} GB" in page and f"and {row['seconds']:.1f} seconds" in page
        plans.append(f"{row['plan_bytes'] / 1e9:.1f}")
    assert f"The estimates were {' and '.join(plans)} GB" in page


def test_speed_without_flash_attention():
    (plain,), (fp8,) = rows_of("speed_flex.json"), rows_of("speed_flex_fp8.json")
    assert plain["list_kernel"] == fp8["list_kernel"] == "flex"
    lists = [row["sparse_breakdown_seconds"]["attention"] for row in (plain, fp8)]
    said = f"take {plain['sparse_seconds']:.1f} seconds in bf16 and {fp8['sparse_seconds']:.1f} with"
    page = re.sub(r"\s+", " ", PERFORMANCE.read_text())
    assert said in page and "lists {:.1f} and {:.1f} of them".format(*lists) in page


def test_start_figures():
    table = next(t for t in tables(PERFORMANCE) if t[0][0] == "process")[1:]
    for (_, *cells), row in zip(table, rows_of("start_h200.json"), strict=True):
        before = f"{row['warm_up_seconds']:.1f} s" if "warm_up_seconds" in row else ""
        assert cells == [before, f"{row['first_seconds']:.1f} s", f"{row['again_seconds']:.1f} s"]


def test_fp8_figures():
    page = re.sub(r"\s+", " ", PERFORMANCE.read_text())
    (fast,), (plain,) = rows_of("speed_1000000_fp8_h200.json"), rows_of("speed_1000000_h200.json")
    assert f"{fast['sparse_seconds']:.1f} seconds in place of {plain['sparse_seconds']:.1f}" in page
    by = {row["tokens"]: row for row in rows_of("linear_h200.json")}
    long, one = by[32_768], by[1]
    kinds = ("bf16", "fp8", "bare")
    assert (
        "{:.1f}, {:.1f} and {:.1f} seconds a million tokens".format(*(long[f"{k}_seconds_a_million"] for k in kinds))
        in page
    )
    assert "{:.2f} ms a layer in place of {:.2f}".format(one["fp8_ms_a_layer"], one["bf16_ms_a_layer"]) in page


def test_host_figures():
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "memory.md").read_text())
    (row,), (card,) = rows_of("speed_host_h200.json"), rows_of("speed_1000000_h200.json")
    peak = f"{row['sparse_peak_allocated_bytes'] / 1e9:.1f} GB allocated at the peak"
    assert f"prefilled sparsely in {row['sparse_seconds']:.1f} seconds, with {peak}" in page
    assert f"the list kernel `{row['list_kernel']}`" in page and f"it takes {card['sparse_seconds']:.1f} " in page
    for row in rows_of("decode_host_h200.json"):
        shown = row["patched_ms"] / 1000
        assert (f"{shown:.2f} seconds a token" if shown > 1 else f"{1000 * shown:.0f} ms at 131,072") in page
    assert f"share of 0.05, {row['sparse_ms']:.0f} ms" in page


def test_dense_against_yarn(main_rows, main_lines):
    page = re.sub(r"\s+", " ", QUALITY.read_text())
    ruler = [100 * main_lines["ruler_*", n, mode].score.mean for n in BEYOND for mode in ("dense", "yarn")]
    assert "({:.1f} points against {:.1f}) and clearly worse at 131,072 ({:.1f} against {:.1f})".format(*ruler) in page
    assert "{2:.1f} points of RULER against {3:.1f}".format(*ruler) in re.sub(r"\s+", " ", README.read_text())
    over = {(line.task, line.length): line for line in summarize(main_rows, "yarn") if line.mode == "dense"}
    within = [over[group, n] for group in ("text_*", "ruler_*") for n in (16_384, 32_768)]
    texts = [-line.nll_over_base.mean for line in within[:2]]
    points = [100 * line.score_over_base.mean for line in within[2:]]
    assert "costs {:.2f} and {:.2f} nats on texts and {:.0f} and {:.0f} points".format(*texts, *points) in page
    texts = [-over["text_*", n].nll_over_base.mean for n in BEYOND]
    assert "{:.2f} nats at 65,536 tokens and {:.2f} at 131,072".format(*texts) in page
    answers = [over["ruler_*", n].nll_over_base.mean for n in BEYOND]
    assert "by {:.2f} and {:.2f} nats".format(*answers) in page


def test_passkey_figures():
    (table,) = (t for t in tables(ROOT / "docs" / "performance.md") if any(row[0] == "patched, sparse" for row in t))
    files = {
        "stock transformers": ["passkey_unpatched.json"],
        "patched, dense": ["passkey_262144.json", "passkey_524288.json", "passkey_1000000.json"],
        "patched, sparse": ["passkey_sparse.json", "passkey_sparse_1000000.json"],
    }
    for label, *cells in table[1:]:
        answers: dict[int, list[bool]] = {}
        for name in files[label]:
            for record in json.loads((RESULTS / name).read_text())["records"]:
                answers.setdefault(record["length"], []).append(record["correct"])
        for length, cell in zip(table[0][1:], cells, strict=True):
            correct = answers.get(int(number(length)))
            assert cell == (f"{sum(correct)}/{len(correct)}" if correct else ""), (label, length)


def test_stock_figures():
    measured = {row["tokens"]: row for row in rows_of("stock_h200.json")}
    (table,) = (
        t for t in tables(ROOT / "docs" / "performance.md") if t[0][1:] == ["4,096", "8,192", "16,384", "32,768"]
    )
    for key, (_, *cells) in zip(("prefill_ratio", "decode_ratio", "decode_again_ratio"), table[1:], strict=True):
        for length, cell in zip(table[0][1:], cells, strict=True):
            assert agrees(cell, measured[int(number(length))][key]), (key, length)


def test_figures_before_and_after():
    """The rows of the table, each from the file of the measurement that it names."""
    text = ROOT / "docs" / "performance.md"
    (table,) = (t for t in tables(text) if t[0] == ["measurement", "before", "after"])
    kinds = {
        "dense attention": ("attention", "share_of_raw"),
        "sparse prefill": ("speed", "sparse_seconds"),
        "prefill as": ("stock", "prefill_ratio"),
        "decoding at new": ("stock", "decode_ratio"),
        "decoding at known": ("stock", "decode_again_ratio"),
    }
    for name, *cells in table[1:]:
        what, key = next(kind for begin, kind in kinds.items() if name.startswith(begin))
        (length,) = re.findall(r"([\d,]+) tokens", name)
        for when, cell in zip(("before", "after"), cells, strict=True):
            endings = ("_1", "_2") if what == "stock" else ("",)
            for ending, figure in zip(endings, cell.split(", "), strict=True):
                rows = {row["tokens"]: row for row in rows_of(f"before_after/{what}_{when}{ending}.json")}
                assert agrees(figure.removesuffix(" s"), rows[int(number(length))][key]), (name, when)
    assert len(table) == 12


def test_breakdown_figures():
    (longest,) = (row for row in rows_of("speed_h200.json") if row["tokens"] == 1_000_000)
    (latest,) = rows_of("speed_1000000_h200.json")
    parts = latest["sparse_breakdown_seconds"]
    parts["rest"] += sum(parts[name] for name in ("norm", "rotation", "swiglu"))
    assert f"a million tokens take {latest['sparse_seconds']:.1f} seconds" in re.sub(
        r"\s+", " ", PERFORMANCE.read_text()
    )
    (table,) = (t for t in tables(ROOT / "docs" / "performance.md") if t[0] == ["part", "seconds"])
    keys = ("linear", "attention", "selection", "recall", "merge", "rest")
    for key, (_, cell) in zip(keys, table[1:], strict=True):
        assert agrees(cell, parts[key]), key
    assert agrees("71.2", longest["sparse_peak_allocated_bytes"] / 2**30)


def test_dense_figures():
    """The figures that stand in sentences: changed in the file, they must be changed in the documents."""
    (headline,) = rows_of("headline.json")
    assert agrees("361", headline["prefill_seconds"])
    assert agrees("0.055", headline["decode_seconds_per_token"])
    assert agrees("70.0", headline["peak_allocated_bytes"] / 2**30)
    assert agrees("70.5", headline["peak_reserved_bytes"] / 2**30)
    short, long = rows_of("attention.json")
    for row, figures in ((short, ("589", "594", "99 %")), (long, ("592", "606", "98 %"))):
        for cell, key in zip(figures, ("ours_tflops", "raw_cudnn_tflops", "share_of_raw"), strict=True):
            assert agrees(cell, row[key]), key
    (mlp,) = rows_of("mlp.json")
    assert agrees("98.3 %", mlp["cut_of_intermediate_activations"])
    assert agrees("96.9 %", mlp["cut_in_chunked_prefill"])
    assert all(figure in README.read_text() for figure in ("361 seconds and 70.0 GiB", "71.2 GiB"))
    text = (ROOT / "docs" / "performance.md").read_text()
    for figure in ("361 s", "0.055 s", "70.0 GiB", "70.5 GiB", "589 of 594", "592 of 606", "98.3 %", "96.9 %"):
        assert figure in text, figure


def test_demo_figures():
    measured = {row["tokens"]: row for row in rows_of("demo.json")}
    shown = re.findall(r"^ +([\d,]+) +\d+x +(\d+) +(\d+)% +(\d+)%$", README.read_text(), re.MULTILINE)
    (table,) = (
        t for t in tables(ROOT / "docs" / "performance.md") if t[0] == ["tokens", "prompts", "stock", "patched"]
    )
    page = [tuple(cell.removesuffix(" %") for cell in row) for row in table[1:]]
    assert shown == page and len(shown) == len(measured)
    for tokens, prompts, unpatched, patched in shown:
        row = measured[int(number(tokens))]
        assert (int(prompts), int(unpatched), int(patched)) == (
            row["prompts"],
            round(100 * row["unpatched"]),
            round(100 * row["patched"]),
        )


def test_temperature_figures():
    """Every comparison that the results files hold whole stands in the table; the sentences below it sum it up."""
    measured: dict[tuple[int, str], dict[str, float]] = {}
    for row in rows_of("temperature.json", "temperature_524288.json"):
        measured.setdefault((row["tokens"], row["package"]), {})[row["variant"].rpartition("=")[2]] = row["nll"]
    compared = {key: nll for key, nll in measured.items() if len(nll) == 3}
    page = ROOT / "docs" / "settings.md"
    (table,) = (t for t in tables(page) if t[0][1:2] == ["text"])
    tokens, shown = 0, []
    for length, package, position, prompt, off in table[1:]:
        tokens = int(number(length)) if length else tokens
        nll = compared[tokens, package]
        for cell, name in ((position, "position"), (prompt, "dense"), (off, "false")):
            assert agrees(cell, nll[name]), (tokens, package, name)
        shown.append((tokens, package))
    assert shown == list(compared)
    gains = [nll["dense"] - nll["position"] for nll in compared.values()]
    won = [gain for gain in gains if gain > 0]
    text = page.read_text()
    assert f"in {len(won)} of the {len(gains)} rows, by {min(won):.3f} to {max(won):.3f} nats" in text
    assert len(gains) - len(won) == 1 and f"(numpy at 131,072 tokens), by {-min(gains):.3f}" in text
    best_off = sum(nll["false"] < nll["position"] for nll in compared.values())
    assert f"No temperature is better still in {best_off} of the {len(gains)} rows" in text
    passkeys = {(row["variant"], row["tokens"]): row["passkeys"] for row in rows_of("temperature_passkey.json")}
    assert set(passkeys.values()) == {"6/6"} and len(passkeys) == 8


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def span(values, form: str) -> str:
    """Smallest and largest value as they stand in a sentence."""
    values = list(values)
    return f"{min(values):{form}} to {max(values):{form}}"


def test_figures_in_sentences():
    """What README.md and docs/sparse-prefill.md say of the quality files in words."""
    names = ("quality", "quality_middle", "quality_524288", "quality_524288_torch", "quality_1000000")
    rows = {(r["tokens"], r["package"], r["variant"]): r for r in rows_of(*(f"{name}.json" for name in names))}
    texts = ("transformers", "sympy", "torch")

    def rise(tokens: int, text: str, variant: str = "block_scores") -> float:
        return rows[tokens, text, variant]["nll"] - rows[tokens, text, "dense"]["nll"]

    def share(tokens: int, key: str, variant: str) -> list[float]:
        return [rows[tokens, text, variant][key] for text in texts]

    page = (ROOT / "docs" / "sparse-prefill.md").read_text()
    eight = sorted(rise(262_144, text) for text in texts)
    assert (
        f"is {eight[0]:.3f} and {eight[1]:.3f} nats worse on two texts and **{eight[2]:.3f} worse on the third**"
        in page
    )
    assert all(rise(524_288, text) < 0 for text in texts) and rise(1_000_000, "transformers") < 0
    assert all(rise(tokens, text) < 0.01 for tokens in (65_536, 131_072) for text in texts)
    for tokens, times in ((131_072, 2), (524_288, 4)):
        raised, default = (share(tokens, "density", f"block_scores{v}") for v in (":recall_target=0.8", ""))
        assert round(mean(raised) / mean(default)) == times
        assert all(rise(tokens, text, "block_scores:recall_target=0.8") > rise(tokens, text) for text in texts)
    (better,) = (r for r in rows_of("quality_262144_torch.json") if r["variant"].endswith("mass=0.7"))
    assert (
        better["nll"] - rows[262_144, "torch", "dense"]["nll"] < 0.004
        and f"at {better['density']:.1%}".replace("%", " %") in page
    )
    slash = "vertical_slash"
    assert f"{mean(share(32_768, 'density', slash)):.0%} of the blocks at 32,768".replace("%", " %") in page
    assert f"{mean(share(131_072, 'density', slash)):.0%} at 131,072".replace("%", " %") in page
    assert f"{span([100 * d for d in share(524_288, 'density', slash)], '.0f')} % and takes" in page
    assert f"takes {span(share(524_288, 'seconds', slash), '.0f')} seconds (dense" in page
    assert f"{span([rise(524_288, text, slash) for text in texts], '.3f')} nats more" in page
    assert min(share(131_072, "seconds", slash)) > max(share(131_072, "seconds", "dense"))
    first = rows[65_536, "transformers", "block_scores"]["seconds"]
    assert f"took {first:.1f} seconds in place of {rows[65_536, 'sympy', 'block_scores']['seconds']:.1f}" in page
    default, dense = (mean(share(32_768, "seconds", variant)) for variant in ("block_scores", "dense"))
    assert f"({default:.2f} against {dense:.2f} seconds)" in page
    assert "as little as 0.10" in page and agrees(
        "0.10", rows[1_000_000, "transformers", "block_scores"]["lowest_recall"]
    )
