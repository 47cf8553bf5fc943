"""The package uses public interfaces only, but for the few private names that stand here with their reasons."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ignite_ema"

# Modules, and names of modules, that the package does without: signals, frames, collected objects, finalizers, readers
# of pickles and other files of their own, registries and hooks of the whole process.
FORBIDDEN = re.compile(
    r"(signal|_thread|gc|ctypes|pickletools|atexit|faulthandler|copyreg|struct|mmap|torch\._C"
    r"|torch\.serialization\.(\w*safe_globals|register_package|set_default_\w+)"
    r"|torch\.set_default_\w+"
    r"|sys\.(_getframe|_current_frames|settrace|setprofile|excepthook|unraisablehook|meta_path|path_hooks)"
    r"|threading\.(settrace|setprofile|excepthook|main_thread|get_ident|get_native_id|enumerate|_\w+)"
    r"|inspect\.(currentframe|stack|trace|getouterframes|getinnerframes)"
    r"|weakref\.finalize|traceback\.walk_(stack|tb))(\.|$)"
)
FRAMES_AND_CODE = re.compile(r"__code__|(ag|cr|gi|tb)_frame|f_(back|code|globals|locals)")
# Private names of others that may be used: the operations that every peer uses, the tables of a module, what
# torch.compile names its model, and what Ignite's own handlers ask an engine for.
ALLOWED = re.compile(
    r"_foreach_\w+|_parameters|_buffers|_modules|_version|_orig_mod|_allowed_events"
    r"|_Unpickler"  # of pickle: the only one whose memory a damaged file cannot blow up
    r"|_(forward|backward|state_dict|load_state_dict)(_pre|_post)?_hooks"
)

BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "attrgetter", "methodcaller"}


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_"


def own_names(tree):
    """The private names that a module defines or assigns, on ``self`` alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def used(node):
    """The names of others that a node uses."""
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [f"{node.module}.{name.name}" for name in node.names]
    if isinstance(node, ast.Attribute):
        full = ast.unparse(node)
        return [full if full.replace(".", "").isidentifier() else node.attr]
    if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in BY_NAME:
        return [text.value for text in node.args if isinstance(text, ast.Constant) and isinstance(text.value, str)]
    return []


def violations(source, own=frozenset()):
    """Line and name of each use of what is forbidden, or private and neither our own nor allowed."""
    tree = ast.parse(source)
    own = {*own, *own_names(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.lineno, "assert"
        elif isinstance(node, ast.FunctionDef) and node.name == "__del__":
            yield node.lineno, "__del__"
        for name in used(node):
            parts = name.split(".")
            private = [part for part in parts if is_private(part) and not ALLOWED.fullmatch(part) and part not in own]
            if FORBIDDEN.match(name) or private or any(map(FRAMES_AND_CODE.fullmatch, parts)):
                yield node.lineno, name


def test_the_package_uses_public_interfaces_only():
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    own = {name for source in sources.values() for name in own_names(ast.parse(source))}
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path, source in sources.items()
        for line, name in sorted(set(violations(source, own)))
    ]
    assert sources
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import signal", "signal"),
        ("import sys; sys._getframe(1)", "sys._getframe"),
        ("frame.f_back.f_globals", "f_globals"),
        ("function.__code__.co_names", "__code__"),
        ("import torch; torch._C._set_grad_enabled(False)", "torch._C._set_grad_enabled"),
        ("import torch; torch.serialization.add_safe_globals([f])", "torch.serialization.add_safe_globals"),
        ("from torch.distributed.fsdp._fully_shard import x", "torch.distributed.fsdp._fully_shard.x"),
        ("getattr(group, '_all_gather_result', None)", "_all_gather_result"),
        ("from operator import attrgetter; attrgetter('_training_state')", "_training_state"),
        ("assert x", "assert"),
        ("class A:\n    def __del__(self): pass", "__del__"),
        ("import torch; torch._foreach_lerp_(a, b, 0.5)", None),
        ("module._parameters; module._buffers; module._modules; tensor._version", None),
        ("class A:\n    def _own(self): return self._own()", None),
    ],
)
def test_the_check_finds_what_is_forbidden(source, name):
    found = [text for _, text in violations(source)]
    assert bool(found) == (name is not None)
    assert name is None or any(text.endswith(name) for text in found)
