"""Published data sets into rows."""

import hashlib
import json
import random
import re
import sys
from pathlib import Path

import pytest

from data import prepare
from data.problems import load_problems
from grader import same_answer
from model import encode_chat, load_tokenizer
from strategy import Strategy, auto_messages, guided_messages
from tests.common import REAL_DATA, ROOT, TINY_BASE, luffy_row, run_script, write_rows


def run_prepare(out, command, source, *flags):
    """(the rows written, the file's entry in the manifest) of one run of data/prepare.py; source: a path, "hub", or rows."""
    if isinstance(source, list):
        source = write_rows(out.with_name("source.jsonl"), source)
    before = set(out.glob("*.jsonl"))
    prepare.main([command, "--source", str(source), "--out", str(out), *map(str, flags)])
    (new,) = set(out.glob("*.jsonl")) - before
    assert not list(out.glob("*.partial"))
    return [json.loads(line) for line in new.open(encoding="utf-8")], json.loads((out / "manifest.json").read_text())[new.name]


def checksum(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# layouts: rows of a source, the rows that are written, and why others or their solutions are not there.
TABLE = json.loads((ROOT / "tests/prepare_rows.json").read_text(encoding="utf-8"))
GSM8K_ROWS = TABLE["layouts"][0]["rows"]


def test_every_layout(tmp_path):
    for number, case in enumerate(TABLE["layouts"]):
        flags = [*case["flags"].split(), "--sha256", "any"]
        rows, entry = run_prepare(tmp_path / str(number), case["command"], case["rows"], *flags)
        counts, dropped = entry["counts"], case.get("dropped", {})
        assert rows == case["expected"], case
        assert counts["read"] == len(case["rows"]) and counts["kept"] == len(rows)
        assert counts["with_solution"] == sum("solution" in row for row in rows)
        assert counts["solutions_missing"] == case.get("missing", counts["solutions_missing"])
        found = {reason: [[e["where"], e["value"]] for e in entries] for reason, entries in entry["dropped"].items()}
        assert found == dropped or "--need_solution" in flags, case


def test_math_folder_as_hendrycks_publishes_it(tmp_path, capsys):
    texts = {
        "train/algebra/2.json": ("Solve $x+1=3$.", "We get $x=2$, so \\boxed{2}."),
        "train/algebra/10.json": ("Halve $1$.", "A box in a box: $\\boxed{\\frac{1}{2}}$."),
        "train/geometry/1.json": ("Draw it.", "No answer here."),
    }
    for name, (problem, solution) in texts.items():
        path = tmp_path / "MATH" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"problem": problem, "level": "Level 1", "type": "x", "solution": solution}))
    rows, entry = run_prepare(tmp_path / "out", "math", tmp_path / "MATH")
    assert [(row["id"], row["answer"], row["solution"]) for row in rows] == [
        ("math-train-train/algebra/10", "\\frac{1}{2}", "A box in a box: $\\boxed{\\frac{1}{2}}$."),
        ("math-train-train/algebra/2", "2", "We get $x=2$, so \\boxed{2}."),
    ]
    assert [e["where"] for e in entry["dropped"]["its answer is empty"]] == ["train/geometry/1.json"]
    listing = "".join(f"{checksum(tmp_path / 'MATH' / name)}  {name}\n" for name in sorted(texts))
    assert entry["source"]["sha256"] == hashlib.sha256(listing.encode()).hexdigest()
    assert "train/geometry/1.json: math-train-train/geometry/1" in capsys.readouterr().out


def test_answers_are_shortened_only_if_it_is_safe(worker):
    for value, expected in TABLE["answers"]:
        assert prepare.clean_answer(value) == expected
        assert same_answer(expected, str(value), worker) or value == "-0.0", value


def test_a_bad_row_is_named_with_file_line_and_value_and_nothing_is_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    for case in TABLE["bad_rows"]:
        good = json.dumps(case["good"])
        path.write_text(f"{good}\n{case['bad']}\n{good}\n")
        with pytest.raises(ValueError) as error:
            run_prepare(tmp_path / "out", case["command"], path, "--sha256", "any")
        (line,) = str(error.value).splitlines()
        assert line.startswith(f"{path}: line 2: ") and all(words in line for words in case["says"]), line
        assert not (tmp_path / "out").exists()


def test_files_that_are_arrays(tmp_path):
    path = tmp_path / "array.jsonl"
    bad = json.dumps([{"problem": "1?", "answer": 1}, {"problem": "2?"}, {"problem": "3?"}])
    for text, message in (bad, "row 2: .*\n.*row 3: "), ("[1, ", "array.jsonl: Expecting value"):  # all that are bad
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            run_prepare(tmp_path / "out", "jsonl", path)
    path.write_text(json.dumps([{"problem": "1?", "answer": 1.0}]))
    assert run_prepare(tmp_path / "out", "jsonl", path)[0][0]["answer"] == "1"


def test_two_problems_may_not_share_an_id(tmp_path):
    source = [{"problem": f"{i}?", "answer": i, "n": i} for i in (1, 1, 2)]  # a repeat may
    assert len(run_prepare(tmp_path / "out", "jsonl", source, "--id_column", "n")[0]) == 2
    source[2]["n"] = 1
    with pytest.raises(ValueError, match="line 3: the id '1' is that of line 1 already"):
        run_prepare(tmp_path / "new", "jsonl", source, "--id_column", "n")


def test_jsonl_keeps_ids_strategies_and_columns_of_the_user(tmp_path):
    row = {"id": "a-1", "problem": "1?", "answer": "1", "solution": "\\boxed{1}", "level": 5, "tests": ["f(1)"]}
    row |= {"strategy": {"type": "sum", "strategy": "Add.", "steps": ["Add them."]}}
    rows, _ = run_prepare(tmp_path / "a", "jsonl", [row, {"problem": "2?", "answer": 2}])
    assert rows == [row, {"id": "jsonl-train-1", "problem": "2?", "answer": "2"}]
    path = tmp_path / "bom.jsonl"
    path.write_text(f"\n{json.dumps(row)}\n \n\n", encoding="utf-8-sig")
    assert run_prepare(tmp_path / "c", "jsonl", path)[0] == [row]  # blank lines and a BOM are passed over
    with pytest.raises(ValueError, match="no row has the column --solution_column answr"):
        run_prepare(tmp_path / "b", "jsonl", [{"problem": "1?", "answer": 1}], "--solution_column", "answr")
    with pytest.raises(ValueError, match="column 'problem' is not used, and has the name of a field"):
        run_prepare(tmp_path / "b", "jsonl", [row | {"q": "1?"}], "--problem_column", "q")


def test_rows_that_are_too_long_are_left_out(tmp_path, capsys):
    """Every part counts: the chat template, the strategy, the solution and the token that ends it."""
    strategy = {"type": "sum", "strategy": "Add.", "steps": ["Add them."]}
    plain = {"problem": "What is 1 + 2?", "answer": 3}
    tokenizer = load_tokenizer(TINY_BASE)
    prompt = len(encode_chat(tokenizer, auto_messages(plain["problem"])))
    guided = len(encode_chat(tokenizer, guided_messages(plain["problem"], Strategy.from_dict(strategy))))
    solved = prompt + len(tokenizer.encode("\\boxed{3}", add_special_tokens=False)) + 1
    flags = ["--max_tokens", TINY_BASE]
    parts = {"strategy": strategy}, {"solution": "\\boxed{3}"}
    for row, tokens in ((plain, prompt), (plain | parts[0], guided), (plain | parts[1], solved)):
        rows, entry = run_prepare(tmp_path / f"{tokens}", "jsonl", [row], *flags, tokens)
        assert len(rows) == 1 and rows[0].get("strategy") == row.get("strategy") and entry["max_tokens"][1] == str(tokens)
        longer = row | {"problem": "What is 1 + 2 + 2?"}
        rows, entry = run_prepare(tmp_path / f"{tokens}-two", "jsonl", [row, longer], *flags, tokens)
        (one,) = entry["dropped"][f"has more than {tokens} tokens"]
        assert len(rows) == 1 and one == {"where": "line 2", "id": "jsonl-train-1", "value": f"{tokens + 2} tokens"}
    assert f"dropped 1: has more than {solved} tokens" in capsys.readouterr().out
    for bad, message in (((TINY_BASE, "0"), "positive whole number, got '0'"), ((tmp_path, "9"), "no tokenizer.json")):
        with pytest.raises(ValueError, match=message):
            run_prepare(tmp_path / "bad", "jsonl", [plain], "--max_tokens", *bad)
    with pytest.raises(ValueError, match="line 1: strategy: expected an object with type, strategy and steps"):
        run_prepare(tmp_path / "bad", "jsonl", [plain | {"strategy": ""}], *flags, 99)


def test_overlap_by_hand():
    words = "one two three four five six seven eight nine ten".split()
    base, circles = " ".join(words), "Two circles touch at P. Find the distance of their centres."
    drawing = "[asy] size(3cm); draw(circle((0,0), 1)); [/asy]"
    far = " ".join(words[:8]) + " acht neun zehn elf"  # 4 runs of its 8 are in those of `t`
    others = {"far": far, "t": base, "short": "Find x.", "drawn": f"{circles} {drawing}", "farther": far + " zwoelf"}
    problems = [
        base.upper() + " ",  # the same text
        " ".join(words[:9]) + " zehn",  # 5 of 6 five-word runs shared, 7 in all: 0.714
        " ".join(words[:8]) + " neun zehn",  # 4 of 8: exactly 0.5
        " ".join(words[:7]) + " acht neun zehn",  # 3 of 9
        base + " " + " ".join(f"w{i}" for i in range(6)),  # 6 of 12
        base + " " + " ".join(f"w{i}" for i in range(7)),  # 6 of 13
        "find X", "Find y.", "?", "", circles, drawing, f"{circles}\n[asy]\ndot((0,0));\n[/asy] [asy]x[/asy]",
    ]  # fmt: skip
    assert prepare.find_overlap(problems, others) == {
        0: ("t", 1.0), 1: ("t", 0.714), 2: ("t", 0.5), 4: ("t", 0.5), 6: ("short", 1.0), 10: ("drawn", 1.0), 12: ("drawn", 1.0),
    }  # fmt: skip


def test_against_removes_and_records(tmp_path):
    text = "A train leaves the station at noon and travels north at forty miles per hour for three hours. How far does it go?"
    test = [{"id": "t0", "problem": text, "answer": "120"}, {"id": "t1", "problem": "What is 1 + 1?", "answer": "2"}]
    against, second = (write_rows(tmp_path / f"test{i}.jsonl", test[i : i + 1]) for i in range(2))
    problems = [text.replace("forty", "sixty"), "what is 1 + 1 ?", "How far does it go?", "What is 1 + 2?"]
    source = [{"problem": problem, "answer": 2} for problem in problems]
    rows, entry = run_prepare(tmp_path / "out", "jsonl", source, "--against", against, second)
    assert [row["id"] for row in rows] == ["jsonl-train-2", "jsonl-train-3"]
    exact, near = (entry["dropped"][f"is {nearly}in a file of --against"] for nearly in ("", "nearly "))
    assert exact == [{"where": "line 2", "id": "jsonl-train-1", "value": f"{second}: t1", "similarity": 1.0}]
    # 23 words, so 19 runs; the changed word is in five of them: 14 / (19 + 19 - 14)
    assert near == [{"where": "line 1", "id": "jsonl-train-0", "value": f"{against}: t0", "similarity": round(14 / 24, 3)}]
    assert entry["against"] == [{"path": str(path), "sha256": checksum(path), "rows": 1} for path in (against, second)]
    with pytest.raises(ValueError, match="no such file"):
        run_prepare(tmp_path / "new", "jsonl", source, "--against", tmp_path / "none.jsonl")
    assert not (tmp_path / "new").exists()


def test_manifest_accounts_for_every_row(tmp_path):
    source = [{"problem": f"{i % 7}?", "answer": str(i % 7) if i != 3 else ""} for i in range(20)]
    path, out = write_rows(tmp_path / "rows.jsonl", source), tmp_path / "out"
    rows, entry = run_prepare(out, "jsonl", path, "--count", 4, "--seed", 1, "--part", "mine")
    usable = [0, 1, 2, 4, 5, 6]  # the fourth row has no answer
    assert [int(row["answer"]) for row in rows] == [usable[i] for i in sorted(random.Random(1).sample(range(6), 4))]
    counts = entry["counts"]
    assert counts["read"] == 20 == counts["usable"] + sum(counts["dropped"].values()) and counts["kept"] == 4 == len(rows)
    assert entry["source"] == {"path": str(path), "sha256": checksum(path), "repo": None, "revision": None}
    typed = f"python data/prepare.py jsonl --source {path} --out {out} --count 4 --seed 1 --part mine"
    assert entry["command"] == typed and "math-verify" in entry["versions"]
    # a second file in the same folder joins the manifest; the same file again is refused
    run_prepare(out, "jsonl", path, "--part", "more")
    assert set(json.loads((out / "manifest.json").read_text())) == {"mine.jsonl", "more.jsonl"}
    with pytest.raises(ValueError, match="mine.jsonl: already there"):
        run_prepare(out, "jsonl", path, "--part", "mine")
    assert entry["sha256"] == checksum(out / "mine.jsonl")
    with pytest.raises(ValueError, match="6 of 20 rows can be used, 8 are needed"):
        run_prepare(tmp_path / "c", "jsonl", path, "--count", 8)


def test_nothing_is_left_if_the_loader_refuses_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "why_unusable", lambda answer: "")  # a filter that lets everything through
    with pytest.raises(ValueError, match="field 'answer' cannot be read"):
        run_prepare(tmp_path / "out", "jsonl", [{"problem": "1?", "answer": "3 +"}])
    assert not list((tmp_path / "out").iterdir())


def test_another_file_than_the_pinned_one_is_refused(tmp_path):
    path, out = write_rows(tmp_path / "train.jsonl", GSM8K_ROWS), tmp_path / "out"
    for flags, message in ([], "expected 17f347dc"), (["--revision", "0" * 40], "--revision is for --source hub"):
        with pytest.raises(ValueError, match=message):
            run_prepare(out, "gsm8k", path, *flags)
    assert not out.exists() and len(run_prepare(out, "gsm8k", path, "--sha256", checksum(path))[0]) == 2


def test_downloads_at_the_pinned_commit(tmp_path, monkeypatch):
    """From a folder in GitHub's place."""
    monkeypatch.setattr(prepare, "GITHUB", (tmp_path / "hub").as_uri())
    pinned, other, repo = "3101c7d5072418e28b9008a6636bde82a006892c", "0123456789" * 4, "openai/grade-school-math"
    out, file = tmp_path / "out", "grade_school_math/data/train.jsonl"
    path = tmp_path / "hub" / repo / pinned / file
    path.parent.mkdir(parents=True)
    sha256 = checksum(write_rows(path, GSM8K_ROWS))
    for command, flags, message in (
        ("gsm8k", "", f"sha256 {sha256}, expected 17f347dc"), ("gsm8k", "--revision main", "40 hex digits, got 'main'"),
        ("gsm8k", f"--revision {other}", "could not be downloaded .*--source FILE"),
        ("math", "--part test", "math --part test is in no hub known to us"),
        ("openr1", f"--revision {other}", "the file of Elliott/Openr1-Math-46k-8192 is not in the table of sources"),
        ("openr1", "--file x.parquet", "the revision of Elliott/Openr1-Math-46k-8192 is not in the table of sources"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run_prepare(out, command, "hub", *flags.split())
    assert not out.exists()
    (tmp_path / "hub" / repo / pinned).rename(tmp_path / "hub" / repo / other)
    rows, entry = run_prepare(out, "gsm8k", "hub", "--revision", other, "--sha256", "any")
    source = {"path": "hub", "sha256": sha256, "host": "github", "repo": repo, "file": file, "revision": other}
    assert len(rows) == 2 and entry["source"] == source


def test_openr1_from_the_hub(tmp_path, monkeypatch):
    path, commit, calls = write_rows(tmp_path / "rows.jsonl", [luffy_row("1?", "1", None)]), "ab" * 20, []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **named: calls.append((args, named)) or path)
    _, entry = run_prepare(tmp_path / "out", "openr1", "hub", "--revision", commit, "--file", "data/x.parquet")
    named = {"repo_type": "dataset", "revision": commit}
    assert calls == [(("Elliott/Openr1-Math-46k-8192", "data/x.parquet"), named)]
    assert entry["source"]["revision"] == commit and entry["source"]["sha256"] == checksum(path)


def test_parquet_reads_like_json(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (it is optional)")
    targets = [f"<think>\nx\n</think>\n\\boxed{{{i}}}" if i % 3 else None for i in range(600)]
    rows = [luffy_row(f"What is {i}?", str(i), target) for i, target in enumerate(targets)]
    parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=170)
    flags = ["--count", 100, "--think", "strip"]
    one, entry = run_prepare(tmp_path / "a", "openr1", tmp_path / "rows.parquet", *flags)
    two, other = run_prepare(tmp_path / "b", "openr1", rows, *flags)
    assert one == two and len(one) == 100 and entry["counts"] == other["counts"] and "pyarrow" in entry["versions"]
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:500])
    with pytest.raises(ValueError, match="torn.parquet: "):
        run_prepare(tmp_path / "c", "openr1", tmp_path / "torn.parquet")


def test_benchmarks_check_the_number_of_problems(tmp_path):
    """LUFFY's file in small: an aime of 30 x 8 is AIME24, an amc of 83 x 4 is not AMC23."""
    rows = [luffy_row(f"Problem {i} of AIME?", f"{i:03d}", None) | {"data_source": "aime"} for _ in range(8) for i in range(30)]
    rows += [luffy_row(f"Problem {i} of AMC?", f"{i}.0", None) | {"data_source": "amc"} for i in range(83) for _ in range(4)]
    aime, entry = run_prepare(tmp_path / "out", "aime24", rows, "--sha256", "any")
    assert [row["id"] for row in aime[:2]] == ["aime24-0", "aime24-1"] and [row["answer"] for row in aime][7] == "7"
    assert len(aime) == 30 and entry["counts"]["of_another_benchmark"] == 332
    assert entry["counts"]["dropped"] == {"repeats a problem": 210}
    with pytest.raises(ValueError, match="83 distinct problems in 332 rows, but amc23 has 40"):
        run_prepare(tmp_path / "out", "amc23", rows, "--sha256", "any")


def test_command_line(tmp_path):
    command = ["data/prepare.py", "jsonl", "--source", tmp_path / "none.jsonl", "--out", tmp_path / "out"]
    done = run_script("-X", "importtime", *command)
    assert done.returncode == 1 and re.search("^prepare.py: .*none.jsonl", done.stderr, re.M), done.stderr
    assert "data.problems" in done.stderr and not re.search(r"\btorch\b", done.stderr)
    for flags in (["--cuont", "1"], ["--coun", "1"], ["--think", "keep"]):  # a typo, an abbreviation, openr1's own
        with pytest.raises(SystemExit):
            prepare.main([*map(str, command[1:]), *flags])


# ---------------------------------------------------------------------------------------------------- real files


def real_sum(command, part):
    """The checksum of the file that `--source hub` would fetch."""
    return next(source.sha256 for source in prepare.SOURCES if (source.command, source.part) == (command, part))


def test_prepare_real_benchmarks(tmp_path, real_data):
    out, command = tmp_path / "bench", ["benchmarks", "--source", REAL_DATA, "--out", str(tmp_path / "bench")]
    prepare.main(command)
    rows = {path.stem: load_problems(path) for path in out.glob("*.jsonl")}
    assert {name: len(group) for name, group in rows.items()} == prepare.BENCHMARKS
    manifest = json.loads((out / "manifest.json").read_text())
    assert {name.removesuffix(".jsonl"): entry["counts"]["kept"] for name, entry in manifest.items()} == prepare.BENCHMARKS
    assert not any(entry["dropped"] for entry in manifest.values())
    assert rows["math500"][0].id == "math500-test/precalculus/807.json"
    first = {name: group[0].answer for name, group in rows.items()}
    assert first.pop("math500") == "\\left( 3, \\frac{\\pi}{2} \\right)"
    assert first == {"aime24": "204", "aime25": "70", "amc23": "27", "olympiad": "2", "minerva": "1.6"}


def test_prepare_real_training_files(tmp_path, real_data):
    rows, dropped = {}, {}
    for line in (ROOT / "tests/prepare_real.jsonl").read_text(encoding="utf-8").splitlines():
        real = json.loads(line)
        key = real["command"], real["part"]
        flags = ["--part", real["part"]] if real["command"] in prepare.PARTS else []
        flags += ["--against", tmp_path / "gsm8k/test.jsonl"] if key == ("gsm8k", "train") else []
        rows[key], entry = run_prepare(tmp_path / key[0], key[0], real_data[real_sum(*key)], *flags)
        first, counts, dropped[key] = rows[key][0], entry["counts"], entry["dropped"]
        assert f"{entry['source']['repo']}@{entry['source']['revision'][:8]}" == real["origin"]
        assert (counts["read"], len(rows[key]), counts["dropped"]) == (real["read"], real["kept"], real["dropped"])
        assert first["answer"] == real["answer"] and first["problem"].startswith(real["problem"])
    # "A train travels 270 miles in 3 hours. At the same rate ...": of its 21 runs, six hold one of the three changed words
    near = dropped["gsm8k", "train"]["is nearly in a file of --against"]
    assert [(e["where"], e["similarity"]) for e in near] == [("line 1315", 0.556), ("line 5163", 0.556)]
    ending = "\n\nThe final answer is \\boxed{72}"
    assert rows["gsm8k", "train"][0]["solution"].endswith("altogether in April and May." + ending)
    assert not any("<<" in row["solution"] or "####" in row["solution"] for row in rows["gsm8k", "train"])
    assert rows["solutions", "train"][0]["solution"].endswith("= 1/√2 = √2/2.\n\nThe final answer is \\boxed{√2/2}")
    assert not any("think>" in row["solution"] or "<answer>" in row["solution"] for row in rows["solutions", "train"])
