"""Settings are assignments at the top of a script; config files and --key=value override them, left to right.

    python train.py config/shakespeare.py --learning_rate=1e-3 --out=out/mine

A config file is plain Python: it assigns names, may compute, and sees the values so far (`batch_tokens = 2 * batch_tokens`);
a name that begins with an underscore is its own. A bare `--key` means `--key=True`.
"""
import ast
import contextlib
import difflib
import json
import math
import os
import sys
import types
import typing


def fail(message):
    """End the program over a mistake of the user's: one line on stderr, exit status 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun, say it once
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def user_errors():
    """Around code that reads what the user named: a ValueError, OSError or ImportError becomes a line instead of a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as e:
        fail(" ".join(str(e).split()))


def declared(source):
    """The settings of a script, from its text: {name: (types, comment, heading)}, in order.

    A setting is a lower-case name assigned at the top level before the first def, class or if. Its types are those of the
    annotation, or that of the value; its comment is what --help prints; a comment line of its own before it is a heading."""
    settings, lines, after = {}, source.splitlines(), 0
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If)):
            break
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name) and target.id.islower() and not target.id.startswith("_"):
            kinds = None
            if isinstance(node, ast.AnnAssign):
                kinds = eval(ast.unparse(node.annotation))
                kinds = typing.get_args(kinds) or (kinds,)
            comment = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip().lstrip("# ")
            heading = [line[2:] for line in lines[after : node.lineno - 1] if line.startswith("# ")]
            settings[target.id] = (kinds, comment, " ".join(heading))
        after = node.end_lineno
    return settings


def convert(name, text, kinds):
    """The value that a command line's `text` means for a setting of these types. Raises ValueError."""
    if bool in kinds and text.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        return text.lower() in ("true", "yes", "on", "1")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if int in kinds and type(value) is float and value.is_integer():
        return int(value)  # --max_steps=1e4
    if str in kinds and (type(value) not in kinds or isinstance(value, str)):
        return text  # to the letter: --prompt=7 is the string "7", quotes and further signs of equality are part of it
    if float in kinds and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(text)  # inf
    return check(name, value, kinds)


def check(name, value, kinds):
    """`value`, made a float or an int where that loses nothing. Raises ValueError if its type is not one of `kinds`."""
    if type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    if int in kinds and type(value) is float and value.is_integer():
        return int(value)
    wanted = " or ".join("None" if k is types.NoneType else k.__name__ for k in kinds)
    raise ValueError(f"{name} must be {wanted}, not {value!r}")


def apply(namespace, argv=None, files=True):
    """Override the settings in `namespace` (a script's globals()) by the command line, left to right.

    Arguments that are no settings are config files to run (files=True) or inputs (files=False). Returns the inputs and the set of names
    that were given. A mistake ends the program with one line; --help prints every setting with default and meaning, and ends it too."""
    argv = sys.argv[1:] if argv is None else argv
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # samples hold any character; a terminal that knows fewer shows question marks
    with open(namespace["__file__"], encoding="utf-8") as f:
        settings = declared(f.read())
    kinds = {name: kinds or (type(namespace[name]),) for name, (kinds, _, _) in settings.items()}
    defaults, inputs, given = {name: namespace[name] for name in settings}, [], set()

    def known(name, where):
        if name not in settings:
            near = difflib.get_close_matches(name, settings, 1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the settings"
            fail(f"{where}: there is no setting {name!r}; {hint}")
        return name

    if "--help" in argv or "-h" in argv:
        print(namespace["__doc__"].strip())
        for name, (_, comment, heading) in settings.items():
            if heading:
                print(f"\n{heading}")
            print(f"  --{name}={defaults[name]!r}".ljust(34), comment)
        sys.exit(0)
    for argument in argv:
        name, equals, text = argument.removeprefix("--").partition("=")
        try:
            if argument.startswith("--"):
                name = known(name.replace("-", "_"), argument)
                if not equals and bool not in kinds[name]:
                    fail(f"--{name} needs a value: --{name}={defaults[name]!r}")
                namespace[name] = convert(name, text if equals else "True", kinds[name])
                given.add(name)
            elif not files:
                inputs.append(argument)
            elif argument.endswith(".py"):
                scope = {key: namespace[key] for key in settings}
                with open(argument, encoding="utf-8") as f:
                    tree = ast.parse(f.read(), argument)
                try:
                    exec(compile(tree, argument, "exec"), scope)
                except Exception as e:  # whatever the user's own code raises
                    fail(f"{argument}: {type(e).__name__}: {' '.join(str(e).split())}")
                assigned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
                for key in assigned & scope.keys():
                    if not key.startswith("_") and not isinstance(scope[key], types.FunctionType):
                        known(key, argument)
                        namespace[key] = check(key, scope[key], kinds[key])
                        given.add(key)
                if "out" in settings and "out" not in given:
                    namespace["out"] = "out/" + os.path.splitext(os.path.basename(argument))[0]
            else:
                fail(f"{argument!r} is neither a config file (*.py) nor a setting (--key=value)")
        except FileNotFoundError:
            fail(f"there is no config file {argument!r}; those that come along are in config/")
        except (ValueError, SyntaxError, OSError) as e:
            fail(f"{argument}: {e}")
    return inputs, given


def settings_of(script, argv):
    """The settings, {name: value}, with which a script would run under these arguments, and the set of names that were given.

    Its mistakes end this program instead."""
    with open(script, encoding="utf-8") as f:
        source = f.read()
    names, namespace = declared(source), {"__file__": script, "__doc__": ""}
    for node in ast.parse(source).body:
        target = getattr(node, "target", None) or (getattr(node, "targets", None) or [None])[0]
        if isinstance(target, ast.Name) and target.id in names and target.id not in namespace:
            namespace[target.id] = ast.literal_eval(node.value)
    _, given = apply(namespace, argv)
    return {name: namespace[name] for name in names}, given


def dump(namespace, notes=()):
    """The settings in `namespace` as the text of a config file that sets them all, after the notes as comments."""
    with open(namespace["__file__"], encoding="utf-8") as f:
        names = declared(f.read())
    values = {name: f"float('{v}')" if isinstance(v := namespace[name], float) and not math.isfinite(v) else repr(v) for name in names}
    return "".join([f"# {note}\n" for note in notes] + [f"{name} = {value}\n" for name, value in values.items()])


def write_json(path, content):
    """Write a JSON file whole or not at all; JSON knows no nan, so it becomes null."""
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".part", "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2)
    os.replace(path + ".part", path)
