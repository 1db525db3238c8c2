"""config/__init__.py: settings, config files and the command line."""
import os
import runpy
import subprocess
import sys

import pytest

import config

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOY = '''"""A toy.

    python toy.py
"""
import os

import config

CONSTANT = 7
# Where
out = "out/toy"  # folder to write
data: str | dict = "data/a"  # one or several
name = "anon"  # of the run
# Numbers
learning_rate = 0.1  # the peak
min_lr: float | None = None  # the floor
max_steps = 10  # steps
every: int | str = "10m"  # steps or a time
resume = False  # go on
compile: bool | None = None  # torch.compile
_private = 3


def main():
    config.apply(globals())
    print([out, learning_rate, max_steps, resume])


later = 1
if __name__ == "__main__":
    main()
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The settings of a fresh toy script as a namespace, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(TOY, encoding="utf-8")
    return runpy.run_path(str(tmp_path / "toy.py"), run_name="toy")


def apply(namespace, *argv):
    config.apply(namespace, list(argv))
    return namespace


def script(path, *argv, **env):
    """Run a script as a process of its own."""
    env = {**os.environ, "PYTHONPATH": REPO + os.pathsep + os.environ.get("PYTHONPATH", ""), **env}
    return subprocess.run([sys.executable, path, *argv], capture_output=True, text=True, encoding="utf-8", env=env, timeout=120)


def refuse(capsys, namespace, *argv):
    """The one line with which these arguments are refused, with exit status 2."""
    with pytest.raises(SystemExit) as e:
        config.apply(namespace, list(argv))
    stdout, stderr = capsys.readouterr()
    assert e.value.code == 2 and stdout == "" and stderr.count("\n") == 1 and stderr.endswith("\n")
    return stderr


# ---- Precedence ----


@pytest.mark.parametrize(
    "argv, steps",
    [
        ([], 10),
        (["a.py"], 1),
        (["a.py", "b.py"], 2),
        (["b.py", "a.py"], 1),
        (["--max_steps=3", "a.py"], 1),
        (["a.py", "--max_steps=3"], 3),
        (["a.py", "--max_steps=3", "b.py"], 2),
        (["--max_steps=3", "--max_steps=4"], 4),
    ],
)
def test_the_rightmost_of_files_and_settings_holds(toy, argv, steps):
    open("a.py", "w").write("max_steps = 1")
    open("b.py", "w").write("max_steps = 2")
    assert apply(toy, *argv)["max_steps"] == steps


def test_a_config_file_computes_and_sees_the_values_so_far(toy):
    open("a.py", "w").write("max_steps = 3 * max_steps\nlearning_rate = 0.5 * learning_rate")
    open("b.py", "w").write("max_steps = max_steps + 1\nif max_steps > 60: name = 'long'")
    apply(toy, "--max_steps=20", "a.py", "b.py", "--learning_rate=2")
    assert (toy["max_steps"], toy["name"], toy["learning_rate"]) == (61, "long", 2.0)


def test_underscore_names_imports_and_functions_are_the_config_files_own(toy):
    open("a.py", "w").write("import math\n_k = 1024\ndef double(x):\n    return 2 * x\nmax_steps = double(_k) + math.floor(1.5)")
    apply(toy, "a.py")
    assert toy["max_steps"] == 2049 and toy["_private"] == 3 and not {"_k", "math", "double"} & set(toy)


def test_a_config_file_names_the_out_folder_unless_somebody_does(toy):
    os.mkdir("sub")
    open("sub/long run.py", "w").write("max_steps = 1")
    open("own.py", "w").write("out = 'elsewhere'")
    fresh = dict(toy)
    assert apply(dict(fresh), "sub/long run.py")["out"] == "out/long run"
    assert apply(dict(fresh), "own.py")["out"] == "elsewhere"
    assert apply(dict(fresh), "--out=mine", "sub/long run.py")["out"] == "mine"
    assert apply(dict(fresh), "sub/long run.py", "--out=mine")["out"] == "mine"
    assert apply(dict(fresh), "own.py", "sub/long run.py")["out"] == "elsewhere"
    assert fresh["out"] == "out/toy"


def test_given_names_what_files_and_settings_set(toy):
    open("a.py", "w").write("learning_rate = 5.0")
    assert config.apply(toy, ["a.py", "--resume", "--max_steps=10"]) == ([], {"learning_rate", "resume", "max_steps"})


def test_given_names_what_a_config_file_sets_to_its_default(toy):
    open("a.py", "w").write("max_steps = 10\nresume = False\nmin_lr = None")
    assert config.apply(toy, ["a.py"])[1] == {"max_steps", "resume", "min_lr"}


def test_without_config_files_arguments_are_inputs_in_order(toy):
    inputs, given = config.apply(toy, ["b.txt", "--max_steps=2", "a.py"], files=False)
    assert inputs == ["b.txt", "a.py"] and given == {"max_steps"} and toy["max_steps"] == 2


# ---- Types ----


@pytest.mark.parametrize(
    "argument, value",
    [
        ("--learning_rate=1", 1.0),
        ("--learning_rate=1e-3", 0.001),
        ("--learning_rate=-2", -2.0),
        ("--learning_rate=.5", 0.5),
        ("--learning_rate=1e4", 10000.0),
        ("--max_steps=1e4", 10000),
        ("--max_steps=-3", -3),
        ("--max_steps=1_000_000", 1000000),
        ("--max-steps=5", 5),
        ("--min_lr=None", None),
        ("--min_lr=3", 3.0),
        ("--name=a=b", "a=b"),
        ("--name==", "="),
        ("--name=--max_steps=3", "--max_steps=3"),
        ("--name=", ""),
        ("--name=7", "7"),
        ("--name=1e4", "1e4"),
        ("--name=007", "007"),
        ("--name=None", "None"),
        ("--name=True", "True"),
        ("--name=[1, 2", "[1, 2"),
        ("--name=ä 中 🤖", "ä 中 🤖"),
        ("--name= two  blanks ", " two  blanks "),
        ('--name=He said "Hello"', 'He said "Hello"'),
        ("--data=data/b", "data/b"),
        ("--data={'data/a': 0.7, 'data/b': 0.3}", {"data/a": 0.7, "data/b": 0.3}),
        ("--every=500", 500),
        ("--every=1e3", 1000),
        ("--every=30s", "30s"),
        ("--resume", True),
        ("--compile", True),
        ("--compile=None", None),
        *((f"--resume={yes}", True) for yes in ("True", "true", "TRUE", "yes", "on", "1")),
        *((f"--resume={no}", False) for no in ("False", "false", "no", "Off", "0")),
    ],
)
def test_a_value_has_the_type_of_its_setting(toy, argument, value):
    name = argument[2:].partition("=")[0].replace("-", "_")
    toy["resume"] = value is False  # so that either spelling changes it
    got = apply(toy, argument)[name]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text", ['"Hello"', "'a' 'b'", '"""Return the sum."""', r'"a\tb"'])
def test_quotes_in_a_string_are_part_of_it(toy, text):
    assert apply(toy, f"--name={text}")["name"] == text


@pytest.mark.parametrize(
    "argument, wanted",
    [
        ("--max_steps=1.5", "int"),
        ("--max_steps=many", "int"),
        ("--max_steps=True", "int"),
        ("--max_steps=None", "int"),
        ("--max_steps=", "int"),
        ("--max_steps=1e999", "int"),
        ("--max_steps=[1]", "int"),
        ("--learning_rate=fast", "float"),
        ("--learning_rate=True", "float"),
        ("--resume=maybe", "bool"),
        ("--resume=2", "bool"),
        ("--min_lr=low", "float or None"),
        ("--compile=3", "bool or None"),
    ],
)
def test_a_wrong_type_is_refused(toy, capsys, argument, wanted):
    line = refuse(capsys, toy, argument)
    name = argument[2:].partition("=")[0]
    assert f"{name} must be {wanted}, not" in line


@pytest.mark.parametrize("name", ["max_steps", "learning_rate", "name", "data", "min_lr", "every"])
def test_a_bare_key_that_is_no_boolean_is_refused(toy, capsys, name):
    line = refuse(capsys, toy, f"--{name}")
    assert f"--{name} needs a value: --{name}=" in line


@pytest.mark.parametrize("source, type_", [("max_steps = 1e4", int), ("learning_rate = 1", float), ("max_steps = 2.0 ** 3", int)])
def test_numbers_in_config_files_become_what_the_setting_is(toy, source, type_):
    open("a.py", "w").write(source)
    assert type(apply(toy, "a.py")[source.split()[0]]) is type_


# ---- Mistakes ----


@pytest.mark.parametrize(
    "argument, hint",
    [
        ("--lerning_rate=1", "did you mean learning_rate?"),
        ("--maxsteps=1", "did you mean max_steps?"),
        ("--resum", "did you mean resume?"),
        ("--qqq=1", "--help lists the settings"),
        ("--qqq", "--help lists the settings"),
        ("--=5", "--help lists the settings"),
        ("--_private=1", "there is no setting '_private'"),
        ("--CONSTANT=1", "there is no setting 'CONSTANT'"),
        ("--later=1", "there is no setting 'later'"),
        ("--main=1", "there is no setting 'main'"),
    ],
)
def test_an_unknown_name_is_refused_with_a_hint(toy, capsys, argument, hint):
    assert hint in refuse(capsys, toy, argument)


@pytest.mark.parametrize("argument", ["stray", "-max_steps=3", "a.txt", ""])
def test_what_is_neither_file_nor_setting_is_refused(toy, capsys, argument):
    assert "neither a config file (*.py) nor a setting (--key=value)" in refuse(capsys, toy, argument)


def test_a_missing_config_file_is_named(toy, capsys):
    assert "there is no config file 'absent.py'" in refuse(capsys, toy, "absent.py")


@pytest.mark.parametrize(
    "source, message",
    [
        ("max_stepz = 3", "did you mean max_steps?"),
        ("max_steps = 'many'", "max_steps must be int, not 'many'"),
        ("max_steps = = 3", "invalid syntax"),
        ("max_steps = max_stepz", "max_stepz"),
        ("max_steps = 1 / 0", "division by zero"),
        ("max_steps = 'a' + 1", ""),
        ("max_steps = int('a')", "invalid literal"),
        ("max_steps = [10][5]", "list index out of range"),
        ("max_steps = {'a': 1}['b']", "'b'"),
        ("import absent_module", "absent_module"),
        ("import os\nmax_steps = os.absent", "absent"),
        ("assert max_steps > 100, 'too few'", "too few"),
        ("raise RuntimeError('not on\\nthis machine')", "not on"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_that_names_the_file(toy, capsys, source, message):
    open("bad.py", "w").write(source)
    line = refuse(capsys, toy, "bad.py")
    assert "bad.py" in line and message in line


def test_a_file_that_a_config_file_misses_is_not_called_a_config_file(toy, capsys):
    open("a.py", "w").write("name = open('absent.txt').read()")
    line = refuse(capsys, toy, "a.py")
    assert "absent.txt" in line and "no config file" not in line


def test_a_config_file_in_another_encoding_is_refused(toy, capsys):
    open("a.py", "wb").write("name = 'é'".encode("latin-1"))
    assert "a.py" in refuse(capsys, toy, "a.py")


def test_only_the_first_local_process_speaks(toy, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as e:
        config.apply(toy, ["--foo=1"])
    assert e.value.code == 2 and capsys.readouterr() == ("", "")


def test_user_errors_end_with_one_line(capsys):
    with pytest.raises(SystemExit) as e, config.user_errors():
        raise ValueError("a message\n  over lines")
    assert e.value.code == 2 and capsys.readouterr().err.endswith(": a message over lines\n")


# ---- Real processes ----


def test_a_process_applies_files_and_settings_left_to_right(toy):
    open("fast.py", "w").write("max_steps = max_steps // 2\nlearning_rate = 1")
    done = script("toy.py", "--max_steps=8", "fast.py", "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "['out/fast', 1.0, 4, True]\n"


@pytest.mark.parametrize("name, argument", [("train.py", "--foo=1"), ("prepare.py", "--tokeniser=gpt2")])
def test_a_process_ends_with_one_line_and_exit_status_2(name, argument):
    done = script(os.path.join(REPO, name), argument)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"{name}: {argument}: there is no setting")


def help_shows(name):
    path = os.path.join(REPO, name)
    done = script(path, "--help", COLUMNS="80")
    with open(path, encoding="utf-8") as f:
        settings = config.declared(f.read())
    defaults = runpy.run_path(path, run_name="imported")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(settings) > 5 and f"python {name}" in done.stdout
    for setting, (_, comment, heading) in settings.items():
        line = [line for line in done.stdout.splitlines() if line.startswith(f"  --{setting}={defaults[setting]!r} ")]
        assert len(line) == 1 and line[0].endswith(comment), setting
        assert not heading or heading in done.stdout.splitlines()


def test_help_lists_every_setting_with_its_default():
    help_shows("prepare.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train.py", "evaluate.py", "sample.py"])
def test_help_of_the_scripts_that_import_torch(name):
    help_shows(name)


def test_help_of_train_lists_every_setting():
    path = os.path.join(REPO, "train.py")
    with open(path, encoding="utf-8") as f:
        settings = config.declared(f.read())
    done = script(path, "--max_steps=3", "--help")
    assert done.returncode == 0 and {"learning_rate", "out", "data", "json"} <= set(settings)
    assert all(f"\n  --{name}=" in done.stdout for name in settings)
    assert "\n  --max_steps=3 " not in done.stdout  # the default, not what was given


# ---- Settings and dump ----


def test_settings_are_the_lower_case_names_before_the_first_function(toy):
    settings = config.declared(TOY)
    assert list(settings) == ["out", "data", "name", "learning_rate", "min_lr", "max_steps", "every", "resume", "compile"]
    assert settings["min_lr"] == ((float, type(None)), "the floor", "")
    assert settings["out"] == (None, "folder to write", "Where") and settings["learning_rate"][2] == "Numbers"


ODD = ['it\'s "odd"', "two\nlines", "back\\slash", "ä中🤖", "\u2028", "# no comment", "--out=x", "'''"]


def test_what_dump_writes_sets_everything_again(toy):
    fresh = dict(toy)
    toy.update(data={"data/a": 0.1, "b": 1 / 3}, learning_rate=1e-300, min_lr=3.0, max_steps=-(2**70), resume=True, compile=False, out="out/mine")
    for name in ODD:
        toy["name"] = name
        with open("dumped.py", "w", encoding="utf-8") as f:
            f.write(config.dump(toy, ["commit abc", "torch 2"]))
        again = apply(dict(fresh), "dumped.py")
        for setting in config.declared(TOY):
            assert again[setting] == toy[setting] and type(again[setting]) is type(toy[setting])
    assert open("dumped.py", encoding="utf-8").read().startswith("# commit abc\n# torch 2\nout = 'out/mine'\n")


def test_infinity_survives_a_dump(toy):
    fresh = dict(toy)
    open("dumped.py", "w").write(config.dump(apply(toy, "--learning_rate=1e999")))
    assert apply(fresh, "dumped.py")["learning_rate"] == float("inf")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = str(tmp_path / "new" / "a.json")
    config.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        config.write_json(path, {"a": object()})
    assert open(path).read() == '{\n  "a": 1\n}'
