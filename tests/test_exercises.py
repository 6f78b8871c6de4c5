"""The exercises: every blank is still in the sources, right lines pass, blank ones do not, and neither do the usual
mistakes."""

import ast
import importlib
import importlib.util
import subprocess
import sys

import pytest

from docs.exercises import EXERCISES, ROOT, grade
from docs.exercises.blank import body_lines, find, merge
from docs.exercises.cases import CASES, same
from docs.exercises.write import text_of, write

# The usual mistakes: a phrase of the solution, and what stands there instead
WRONG = {
    "mask": ("k > q - window", "k >= q - window"),                              # W keys and the query's own
    "rmsnorm": ("x32 = x.float()", "x32 = x.float() - x.float().mean(-1, keepdim=True)"),
    "rmsnorm without ε": (" + eps", ""),
    "sampling": ("ordered.softmax(-1).cumsum(-1)", "ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)"),
    "dpo": ("* F.logsigmoid(beta * delta)", "* (beta * delta).sigmoid().log()"),
    "rope": ('if layout == "half"', 'if layout != "half"'),
    "gqa": ("x.repeat_interleave(q.shape[1] // k.shape[1], 1)", "x.repeat(1, q.shape[1] // k.shape[1], 1, 1)"),
    "router": ("scores.gather", "ranking.gather"),                              # the correction counts for the weight
    "lora": ("side = self.scale * ", "side = "),
    "cache": ("torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)", "k, v"),  # what the chunk still needs is lost
    "rule": ("(layer.mixer.kv_heads, -1)", "(1, -1)"),                          # all of q, all of k, all of v
    "scan": ("h = h * ~begins[:, t, None, None]", "pass"),
    "softmax": ("o * shrink[:, None]", "o"),
}


def solution(name: str, phrase: str = "", instead: str = "") -> str:
    """The source of an exercise, with a phrase of its functions replaced."""
    exercise = EXERCISES[name]
    source = exercise.source()
    segments = [ast.get_source_segment(source, find(ast.parse(source), blank)) or "" for blank in exercise.blanks]
    if phrase:
        holder, = (segment for segment in segments if phrase in segment)
        source = source.replace(holder, holder.replace(phrase, instead, 1))
    return source


def module_of(name: str, text: str, folder, monkeypatch):
    """What a student's file of this text becomes."""
    exercise, path = EXERCISES[name], folder / f"{name}.py"
    path.write_text(merge(exercise.source(), text, exercise.module, exercise.blanks).text)
    spec = importlib.util.spec_from_file_location(f"exercise_{name}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def needs(name: str) -> None:
    if EXERCISES[name].needs:
        pytest.importorskip(EXERCISES[name].needs)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_blank_is_cut_out_of_the_source(name):
    """By name: no line of a solution is in the student's file, and put back it is the source again."""
    exercise = EXERCISES[name]
    source, text = exercise.source(), text_of(exercise, 1)
    given, real = ast.parse(text), ast.parse(source)
    assert ast.get_docstring(given) == ast.get_docstring(real)
    for blank in exercise.blanks:
        mine, theirs = find(given, blank), find(real, blank)
        assert ast.dump(mine.args) == ast.dump(theirs.args) and ast.get_docstring(mine) == ast.get_docstring(theirs)
        assert isinstance(mine.body[-1], ast.Raise) and len(mine.body) <= 2
        start, end = body_lines(theirs)
        solved = {line.strip() for line in source.splitlines()[start - 1 : end] if len(line.strip()) > 20}
        assert not solved & {line.strip() for line in text.splitlines()}
    assert ast.dump(ast.parse(merge(source, source, exercise.module, exercise.blanks).text)) == ast.dump(real)
    emptied = ast.parse(merge(source, text, exercise.module, exercise.blanks).text)
    assert all(isinstance(find(emptied, blank).body[-1], ast.Raise) for blank in exercise.blanks)
    assert len(emptied.body) == len(real.body)                  # nothing but the functions came from the file


@pytest.mark.parametrize("name", EXERCISES)
def test_its_graders_are_tests_of_the_project(name):
    """By name; that each mistake of the list is found is the next test but one."""
    assert name in CASES and name in WRONG
    for test in EXERCISES[name].tests:
        file, _, function = test.partition("[")[0].partition("::")
        assert find(ast.parse((ROOT / file).read_text()), function)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_source_passes_what_was_worked_out_by_hand(name):
    needs(name)
    for words, expected, got in CASES[name](importlib.import_module(EXERCISES[name].module)):
        assert same(expected, got), words


@pytest.mark.parametrize("mistake", [mistake for mistake in WRONG if mistake != "softmax"])
def test_a_usual_mistake_is_found_by_small_numbers(mistake, tmp_path, monkeypatch):
    name = mistake.split()[0]
    module = module_of(name, solution(name, *WRONG[mistake]), tmp_path, monkeypatch)
    assert not all(same(expected, got) for _, expected, got in CASES[name](module))


def test_what_a_student_adds_comes_along(tmp_path, monkeypatch):
    """A helper, an import and a constant of the student's; lines under __name__ == "__main__" do not run."""
    text = '''"""Mine."""
import math as m
HALF = 0.5
def root(x):
    return m.e ** (HALF * m.log(x))
def rms_norm(x, gain, eps, offset=0.0, cast_after_gain=False):
    return ((gain + offset) * x.float() / root((x.float() ** 2).mean() + eps)).to(x.dtype)
if __name__ == "__main__":
    raise SystemExit
'''
    module = module_of("rmsnorm", text, tmp_path, monkeypatch)
    assert all(same(expected, got) for _, expected, got in CASES["rmsnorm"](module))


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    assert len(write(tmp_path)[0]) == len(EXERCISES)
    (tmp_path / "rope.py").write_text("mine")
    assert write(tmp_path)[0] == [] and (tmp_path / "rope.py").read_text() == "mine"


def test_what_is_not_installed_is_passed_over_by_name(monkeypatch, capsys):
    monkeypatch.setattr(grade.importlib.util, "find_spec", lambda name: None)
    assert grade.main("softmax") == grade.NOTHING
    assert "softmax: not graded, triton is not installed" in capsys.readouterr().out


def test_from_inside_the_folder(tmp_path):
    """check.py, in the words of a student: what is blank, at which line; what came out, and what should have."""
    write(tmp_path)
    (tmp_path / "rmsnorm.py").write_text(solution("rmsnorm", *WRONG["rmsnorm without ε"]))
    done = subprocess.run([sys.executable, "check.py", "rmsnorm", "dpo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.splitlines()[:3] == [
        "rmsnorm: not yet. By hand, x = 1 1, ε = 3: divided by √(1 + 3)",
        "  expected  [0.5, 0.5]",
        "  got       [1, 1]",
    ]
    line = next(i for i, row in enumerate((tmp_path / "dpo.py").read_text().splitlines(), 1) if "raise Not" in row)
    assert done.stdout.splitlines()[3] == f"dpo: still blank, line {line} of your file"


@pytest.mark.slow
def test_the_projects_own_tests_run_with_the_students_lines(tmp_path):
    """Right lines pass. The order of roundings, which no small number shows, is found by the tests of the project."""
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(solution("rmsnorm"))
    wrong.write_text(solution("rmsnorm", "if cast_after_gain:", "if not cast_after_gain:"))
    for file, status, words in ((right, 0, "right. 6 tests"), (wrong, 1, "test_rms_norm_is_bit_equal")):
        done = subprocess.run([sys.executable, "-m", "docs.exercises.grade", "rmsnorm", str(file)], cwd=ROOT,
                              capture_output=True, text=True)
        assert (done.returncode, words in done.stdout) == (status, True), done.stdout + done.stderr


@pytest.mark.slow
def test_inside_a_kernel_too(tmp_path):
    """What was summed before does not shrink as the maximum grows."""
    needs("softmax")
    (tmp_path / "softmax.py").write_text(solution("softmax", *WRONG["softmax"]))
    done = subprocess.run([sys.executable, "-m", "docs.exercises.grade", "softmax", str(tmp_path / "softmax.py")],
                          cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.startswith("softmax: not yet. By hand, 256 keys")) == (1, True), done.stdout


@pytest.mark.slow
def test_every_grader_is_collected():
    """With their parameters: names in brackets too are those of pytest."""
    tests = [test for exercise in EXERCISES.values() for test in exercise.tests]
    done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", *tests], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:]
