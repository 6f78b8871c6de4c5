"""The exercises: every blank is still in the sources, right lines pass, blank ones do not, and neither do the usual
mistakes."""

import ast
import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from docs.exercises import EXERCISES, ROOT, grade
from docs.exercises import __main__ as command
from docs.exercises.blank import body_lines, find, merge
from docs.exercises.cases import CASES
from docs.exercises.compare import difference, same
from docs.exercises.given import told
from docs.exercises.write import text_of, write
from tests import forked

# Usual mistakes: a phrase of the solution, and what stands there instead
WRONG = {
    "mask": ("k > q - window", "k >= q - window"),                              # W keys and the query's own
    "mask, padding sees what is real": (" & ((q < 0) == (k < 0))", " & (k >= 0)"),
    "mask, documents of the queries alone": ("q_doc[:, :, None] == k_doc[:, None, :]",
                                             "q_doc[:, :1, None] == k_doc[:, None, :]"),
    "mask, the first row for all": ("k_pos[:, None, :]", "k_pos[:1, None, :]"),
    "rmsnorm": ("x32 = x.float()", "x32 = x.float() - x.float().mean(-1, keepdim=True)"),
    "rmsnorm without ε": (" + eps", ""),
    "rmsnorm, ε outside the root": ("torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)",
                                    "(1 / (x32.square().mean(-1, keepdim=True).sqrt() + eps))"),
    "rmsnorm without keepdim": ("mean(-1, keepdim=True)", "mean(-1)"),
    "rmsnorm, a sum": (".mean(-1, keepdim=True)", ".sum(-1, keepdim=True)"),
    "rmsnorm, the offset in bfloat16": ("offset + gain.float()", "offset + gain"),
    "rmsnorm, the other cast order": ("if cast_after_gain:", "if not cast_after_gain:"),
    "rmsnorm, statistics in bfloat16": ("x32 = x.float()", "x32 = x"),
    "rmsnorm returns nothing": ("        return (x_hat * gain.float()).to(x.dtype)", "        pass"),
    "sampling": ("ordered.softmax(-1).cumsum(-1)", "ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)"),
    "sampling, < for ≤": ("<= 1 - top_p", "< 1 - top_p"),
    "sampling, top-k beyond V": ("min(top_k, logits.shape[-1])", "top_k"),
    "sampling, top-p of all": ("dropped.scatter(-1, index, dropped)", "dropped"),
    "sampling, nothing stays": ("        dropped[:, -1] = False\n", "        dropped[:, -1] |= top_p < 0.2\n"),
    "sampling, min-p alone": ("min_p * p.amax(-1, keepdim=True)", "min_p"),
    "dpo": ("* F.logsigmoid(beta * delta)", "* (beta * delta).sigmoid().log()"),
    "dpo, labels swapped": ("(1 - smoothing) *", "smoothing *"),
    "dpo, a mean": ("* F.logsigmoid(beta * delta)", "* F.logsigmoid(beta * delta).mean()"),
    "dpo without β": ("F.logsigmoid(beta * delta)", "F.logsigmoid(delta)"),
    "dpo, log of a sigmoid": ("F.logsigmoid(-beta * delta)", "(-beta * delta).sigmoid().log()"),
    "rope": ('if layout == "half"', 'if layout != "half"'),
    "rope, the sign in rotate": ("turned * cos + swapped * sin", "turned * cos - swapped * sin"),
    "rope, the sign of the other half": ("torch.cat([-sin, sin], -1)", "torch.cat([sin, -sin], -1)"),
    "rope, one factor": (" angles.sin() * attention_factor(rope)", " angles.sin()"),
    "rope without lengths": ("frequencies(rope, head_dim, lengths)", "frequencies(rope, head_dim, lengths[:1])"),
    "rope, outer product": ("positions[..., None].float() * frequencies(rope, head_dim, lengths)",
                            "positions[:, :, None, None].float() * frequencies(rope, head_dim, lengths)"),
    "rope, the dtype of the tables": (").to(x.dtype) ", ") "),
    "rope, tables rounded": ("turned * cos + swapped * sin", "turned * cos.to(x.dtype) + swapped * sin.to(x.dtype)"),
    "rope, halves repeated": ("torch.stack([cos, cos], -1).flatten(-2)", "torch.cat([cos, cos], -1)"),
    "gqa": ("x.repeat_interleave(q.shape[1] // k.shape[1], 1)", "x.repeat(1, q.shape[1] // k.shape[1], 1, 1)"),
    "gqa, a softmax in the dtype of q": (", dtype=torch.float32", ""),
    "gqa, scores in float32": ("q @ k.transpose(-2, -1)", "q.float() @ k.float().transpose(-2, -1)"),
    "gqa, masked with −∞": ("torch.finfo(scores.dtype).min", "-torch.inf"),
    "gqa, the cap before the scale": ("softcap * torch.tanh(scores / softcap)",
                                      "softcap * torch.tanh(scores / scale / softcap) * scale"),
    "gqa, the sink's value": ("[..., : v.shape[-2]]", "[..., -v.shape[-2] :]"),
    "gqa, one sink for all": ("sinks[:, None, None]", "sinks[:1, None, None]"),
    "gqa, a float mask multiplied": ("(scores + mask)", "(scores * mask)"),
    "gqa, the mask upside down": (".tril()", ".triu()"),
    "router": ("scores.gather", "ranking.gather"),                              # the correction counts for the weight
    "router, in bfloat16": ("logits.softmax(-1, dtype=torch.float32)", "logits.softmax(-1).float()"),
    "router, sigmoids in bfloat16": ("logits.float().sigmoid()", "logits.sigmoid().float()"),
    "router, groups masked with 0": ("-torch.inf", "0.0"),
    "router, groups before the correction": ("in_best_groups(ranking, ", "in_best_groups(scores, "),
    "router, renormalised over all": ("weights.sum(-1, keepdim=True)", "scores.sum(-1, keepdim=True)"),
    "router, nothing added": ("1e-20 if", "0.0 if"),
    "router, the number forgotten": ("1e-20 if config.renormalize is True else config.renormalize", "1e-20"),
    "router without the scale": ("weights = weights * config.scale", "pass"),
    "router without its sparse rule": ("if config.sparse is not None:", "if False:"),
    "lora": ("side = self.scale * ", "side = "),
    "lora, ‖V‖ not detached": ("(W + self.scale * B @ A).detach()", "(W + self.scale * B @ A)"),
    "lora, ‖V‖ not detached in merged": ("V.detach()", "V"),
    "lora, m detached": ("stretch = self.magnitude / ", "stretch = self.magnitude.detach() / "),
    "lora, rounded before the sum": ("(y + side)", "(y + side.to(y.dtype))"),
    "lora, W x dropped too": ("(y + side)", "(y * bool((dropped == x).all()) + side)"),
    "lora, dropout always": ("self.dropout, self.training", "self.dropout, True"),
    "lora, the bias stretched": ("y if self.bias is None else y - self.bias", "y"),
    "lora, the first expert": ("(self.A[expert], self.B[expert])", "(self.A[0], self.B[0])"),
    "lora, norms of columns": ("V.detach().norm(dim=1)", "V.detach().norm(dim=0)"),
    "cache": ("torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)", "k, v"),  # what the chunk still needs is lost
    "cache without fresh": ("(k, v) if slots.fresh else ", ""),
    "cache, the first row for all": ("if slots.alike:", "if True:"),
    "cache, the bin too": (": slots.used], self.v", ": slots.used + 1], self.v"),
    "cache, keys for values": ("(self.v, v)", "(self.v, torch.cat([k, k], -1))"),
    "cache, only the new": ("(self.k[:, :, : slots.used], self.v[:, :, : slots.used])", "(k, v)"),
    "rule": ("(layer.mixer.kv_heads, -1)", "(1, -1)"),                          # all of q, all of k, all of v
    "rule, a copy": ("tensor.unflatten(", "tensor.clone().unflatten("),
    "rule, query heads": ("layer.mixer.kv_heads", "layer.mixer.heads"),
    "rule, numbered": ("yield from ((0, rows)", "yield from ((len(group), rows)"),
    "rule, other way round": ("(layer.mixer.kv_heads, -1))", "(-1, layer.mixer.kv_heads)).transpose(0, 1)"),
    "scan": ("h = h * ~begins[:, t, None, None]", "pass"),
    "scan, forgets afterwards": ("outputs.append((h @ C", "outputs.append((h * (1 if begins is None else "
                                 "~begins[:, t, None, None]) @ C"),
    "scan, the first h": ("h = step(x[:, t], ", "h = step(x[:, 0], "),
    "scan, B without Δ": ("(delta[..., None] * B[:, None])", "B[:, None]"),
    "scan, A without exp": ("torch.exp(delta[..., None] * A)", "(1 + delta[..., None] * A)"),
    "scan without D": (" + x * D", ""),
    "scan, y before the step": ("h = step(x[:, t], delta[:, t], A, B[:, t], h)\n        outputs.append((h @",
                                "h, old = step(x[:, t], delta[:, t], A, B[:, t], h), h\n        outputs.append((old @"),
    "softmax": ("o * shrink[:, None]", "o"),
    "softmax, the sum does not shrink": ("l * shrink", "l"),
    "softmax, ALiBi upside down": ("keys[None, :] - last[:, None]", "last[:, None] - keys[None, :]"),
    "softmax without its cap": ("s = tanh(s * cap)", "s = s * cap"),
    "softmax, values past the end": ("v_stride, high, WIDTH, BLOCK, MASKED", "v_stride, high, WIDTH, BLOCK, False"),
}
# What is said, of which lines under the `def` in line 2
TOLD = {
    "not yet. rms_norm, line 2 of your file, returns None": ("rmsnorm", "    x.float()"),
    "  got       None: your function returned None (rms_norm, line 2 of your file)":
        ("rmsnorm", "    if offset:\n        return x"),
    "In the first case: your function returned None (route, line 2 of your file)":
        ("router", "    if config.sparse:\n        return logits, logits"),
    "In the first case, line 4 of your file, inside in_best_groups, which it calls\n  AttributeError":
        ("router", "    from nanollm.layers.moe import in_best_groups\n    return in_best_groups(logits, 3), 0"),
    "In the first case, line 3 of your file, inside sparse_route, which it calls":
        ("router", "    return sparse_route(logits, None, 3)"),
    "In the first case, line 3 of your file\n  NameError": ("dpo", "    return nothing"),
    "dpo: line 3 of dpo.py is not Python": ("dpo", "    return ("),
    "dpo: in dpo.py there is no dpo; the function must keep its name and place": ("dpo", None),
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


@pytest.mark.parametrize("mistake", [mistake for mistake in WRONG if not mistake.startswith("softmax")])
def test_a_usual_mistake_is_found_by_small_numbers(mistake, tmp_path, monkeypatch):
    name = mistake.split()[0].strip(",")
    module = module_of(name, solution(name, *WRONG[mistake]), tmp_path, monkeypatch)
    try:
        found = not all(same(expected, got) for _, expected, got in CASES[name](module))
    except (RuntimeError, IndexError, ValueError):
        found = True                                            # shapes that do not fit; the grader says at which line
    assert found


def test_what_a_student_adds_comes_along(tmp_path, monkeypatch):
    """A helper, an import and a constant of the student's; lines under __name__ == "__main__" do not run."""
    text = '''"""Mine."""
import math as m
HALF = 0.5
def root(x):
    return m.e ** (HALF * m.log(x))
def rms_norm(x, gain, eps, offset=0.0, cast_after_gain=False):
    squares = (x.float() ** 2).mean(-1, keepdim=True) + eps
    x_hat = x.float() / squares.detach().apply_(root)
    return ((gain.float() + offset) * (x_hat if cast_after_gain else x_hat.to(x.dtype))).to(x.dtype)
if __name__ == "__main__":
    raise SystemExit
'''
    module = module_of("rmsnorm", text, tmp_path, monkeypatch)
    assert all(same(expected, got) for _, expected, got in CASES["rmsnorm"](module))


@pytest.mark.parametrize("words", TOLD)
def test_what_is_said_of_a_file(words, tmp_path, monkeypatch, capsys):
    """With the student's line, and no word of what stands around it."""
    name, lines = TOLD[words]
    exercise = EXERCISES[name]
    arguments = ast.unparse(find(ast.parse(exercise.source()), exercise.blanks[0]).args)
    text = f"from __future__ import annotations\ndef {exercise.blanks[0]}({arguments}):\n{lines}\n" if lines else ""
    (tmp_path / f"{name}.py").write_text(text)
    parent, _, leaf = exercise.module.rpartition(".")
    package = importlib.import_module(parent)
    importlib.import_module(exercise.module)
    monkeypatch.setattr(package, leaf, getattr(package, leaf))                  # all is put back: main may change it
    monkeypatch.delitem(sys.modules, exercise.module)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    for variable in ("HF_HUB_OFFLINE", "TRITON_INTERPRET"):
        monkeypatch.setenv(variable, os.environ.get(variable, "0"))
    assert grade.main(name, str(tmp_path / f"{name}.py")) == grade.WRONG
    assert words in capsys.readouterr().out


def test_what_a_solution_calls_is_told():
    """With its signature, as are the fields it reads, from where they are defined."""
    lines = told(EXERCISES["rope"]) + told(EXERCISES["router"]) + told(EXERCISES["softmax"]) + told(EXERCISES["cache"])
    for start in ("frequencies(rope: Rope, head_dim: int, lengths: Tensor) -> Tensor", "attention_factor(rope: Rope)",
                  "in_best_groups(ranking: Tensor, groups: ExpertGroups)", "layout: Literal",
                  "renormalize: bool | float", "# Mixtral True",
                  "load_rows(base, rows, stride, end, WIDTH", "self.fresh = filled == 0"):
        assert any(line.strip().startswith(start) for line in lines), start
    assert "scaled_frequencies" not in text_of(EXERCISES["rope"], 1)            # imported there, for something else


def test_a_difference_in_words():
    third = torch.tensor([1.0, 3.0]) / 3
    assert "1 of 2 numbers differ, by 6e-08 at most" in difference(third, third + torch.tensor([6e-8, 0.0]))
    assert "only rounding" in difference(third, third + torch.tensor([6e-8, 0.0]))
    assert "only rounding" not in difference(third, third + 0.01)
    assert "float32 and bfloat16" in difference(third, third.bfloat16())


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    assert len(write(tmp_path)[0]) == len(EXERCISES)
    (tmp_path / "rope.py").write_text("mine")
    assert write(tmp_path)[0] == [] and (tmp_path / "rope.py").read_text() == "mine"


def test_what_is_not_installed_is_passed_over_by_name(monkeypatch, capsys):
    monkeypatch.setattr(grade.importlib.util, "find_spec", lambda name: None)
    assert grade.main("softmax") == grade.NOTHING
    assert "softmax: not graded, triton is not installed" in capsys.readouterr().out
    assert command.main(["check", "dpo"]) == grade.NOTHING      # the Python of the system, which has no torch
    assert f"{sys.executable} has no torch: run check.py with the Python" in capsys.readouterr().out


def test_from_inside_the_folder(tmp_path):
    """check.py, in the words of a student: what is blank, at which line; what came out, and what should have."""
    write(tmp_path)
    (tmp_path / "rmsnorm.py").write_text(solution("rmsnorm", *WRONG["rmsnorm without ε"]))
    done = subprocess.run([sys.executable, "check.py", "rmsnorm", "dpo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.splitlines()[:3] == [
        "rmsnorm: not yet. By hand, x = 1 1, gain 1 1, ε = 3: divided by √(1 + 3)",
        "  expected  [0.5, 0.5]",
        "  got       [1, 1]",
    ]
    line = next(i for i, row in enumerate((tmp_path / "dpo.py").read_text().splitlines(), 1) if "raise Not" in row)
    assert done.stdout.splitlines()[3] == f"dpo: still blank, line {line} of your file"


@pytest.mark.slow
def test_the_projects_own_tests_run_with_the_students_lines(tmp_path):
    """Right lines pass. A root and a quotient for rsqrt, which no small number shows, are told as what they are."""
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(solution("rmsnorm"))
    wrong.write_text(solution("rmsnorm", "x32 * torch.rsqrt(", "x32 / torch.sqrt("))
    for file, status, words in ((right, 0, "right. 6 tests"), (wrong, 1, "in float32: only rounding")):
        done = subprocess.run([sys.executable, "-m", "docs.exercises.grade", "rmsnorm", str(file)], cwd=ROOT,
                              capture_output=True, text=True)
        assert (done.returncode, words in done.stdout) == (status, True), done.stdout + done.stderr


def graded() -> None:
    """The main function of a forked process, which has imported no kernel: python -m docs.exercises.grade."""
    sys.exit(grade.main(*sys.argv[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [mistake for mistake in WRONG if mistake.startswith("softmax")])
def test_inside_a_kernel_too(mistake, tmp_path):
    """In the interpreter, which has to be chosen before Triton is imported: one in the words of a student."""
    needs("softmax")
    file = tmp_path / "softmax.py"
    file.write_text(solution("softmax", *WRONG[mistake]))
    if mistake == "softmax":
        done = subprocess.run([sys.executable, "-m", "docs.exercises.grade", "softmax", str(file)], cwd=ROOT, text=True,
                              capture_output=True, env={**os.environ, "TRITON_INTERPRET": ""})
        status, said = done.returncode, done.stdout
    else:
        ended = forked.start(1, graded, "softmax", file).end()
        (status,), said = ended.codes, ended.out
    assert (status, said.startswith("softmax: not yet. By hand, ")) == (1, True), said


def collected() -> None:
    """The main function of a forked process: python -m pytest."""
    sys.exit(pytest.main(sys.argv[1:]))


@pytest.mark.slow
def test_every_grader_is_collected():
    """With their parameters: names in brackets too are those of pytest."""
    tests = [test for exercise in EXERCISES.values() for test in exercise.tests]
    ended = forked.start(1, collected, "--collect-only", "-q", "-p", "no:cacheprovider", *tests).end()
    assert ended.codes == [0], ended.said[-1000:]
