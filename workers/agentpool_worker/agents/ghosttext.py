"""From the ghostwriter's text to tests that pytest can collect.

Used by `ghostwriting` in the child that has imported the module in question: what is executed here is the ghostwriter's
text, up to but not including the calls of the functions under test. Knows nothing of processes and files.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import types
import typing
from typing import Any, NamedTuple

__all__ = ["Finisher", "describe"]

#: Repairs of one test. More means that it is beyond repair.
_MOST_REPAIRS = 6


def describe(error: BaseException) -> str:
    """An error in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


class _Statement(NamedTuple):
    """One statement that works. `test`: its name if it is a test; `skip_reason`: why that is to be skipped."""

    source: str
    test: str = ""
    skip_reason: str = ""


class Finisher:
    """Keeps of a ghostwritten text what works.

    The ghostwriter forgets imports and writes expressions that cannot be evaluated: one such line would keep pytest
    from collecting the whole file. So each statement is executed on its own. What is clearly missing is mended; a test
    that fails for another reason is dropped and reported. A test that would fail on every run, because there is no
    usable strategy for a parameter or the ghostwriter does not know how to await, is marked to be skipped.
    """

    def __init__(self, module: types.ModuleType, dropped: list[dict[str, str]]) -> None:
        self._module = module
        self._dropped = dropped
        self._namespace: dict[str, Any] = {"__name__": "ghostwritten"}
        self._imports: set[str] = set()
        self._statements: list[_Statement] = []
        self._names: set[str] = set()

    def finish(self, text: str) -> dict[str, Any]:
        """The answer for `text`. Raises SyntaxError where the ghostwriter wrote no Python at all."""
        for node in ast.parse(text).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._add_import(ast.unparse(node))
            else:
                self._add_statement(node, text)
        tests = [statement for statement in self._statements if statement.test]
        if not tests:
            reason = self._dropped[0]["reason"] if self._dropped else "it defines no public function with arguments"
            return {"reason": reason}
        source = self._source()
        _execute(source, {"__name__": "ghostwritten"})  # as pytest will when it collects
        return {
            "text": source,
            "tests": len(tests),
            "needs_work": [{"test": test.test, "reason": test.skip_reason} for test in tests if test.skip_reason],
            "dropped": self._dropped,
        }

    def _source(self) -> str:
        imports = sorted(self._imports, key=lambda line: (line.startswith("from"), line))
        parts = ["\n".join(imports)]
        for statement in self._statements:
            skip = f"@pytest.mark.skip(reason={statement.skip_reason!r})\n" if statement.skip_reason else ""
            parts.append(skip + statement.source)
        return "\n\n\n".join(parts) + "\n"

    def _add_import(self, line: str) -> bool:
        """Whether it worked. A test that needs what did not will say so."""
        try:
            _execute(line, self._namespace)
        except Exception:
            return False
        self._imports.add(line)
        return True

    def _add_statement(self, node: ast.stmt, text: str) -> None:
        source = _segment(node, text)
        name = ""
        if isinstance(node, ast.FunctionDef):
            name = node.name
            while name in self._names:  # two of one name would be one test
                name += "_again"
            source = source.replace(f"def {node.name}(", f"def {name}(", 1)
        working, error = self._mend(source)
        if working is None:
            reason = f"the ghostwritten test is broken: {describe(error)}" if error else "it is broken beyond repair"
            if name:
                self._dropped.append({"test": name, "reason": reason})
            return
        skip_reason = self._skip_reason(ast.parse(working).body[0]) if name else ""
        if skip_reason:
            self._add_import("import pytest")
        self._names.add(name)
        self._statements.append(_Statement(working, name, skip_reason))

    def _mend(self, source: str) -> tuple[str | None, Exception | None]:
        """`source`, executed and if need be mended; or None, and what is wrong with it."""
        error: Exception | None = None
        for _ in range(_MOST_REPAIRS):
            try:
                _execute(source, self._namespace)
            except NameError as raised:
                error = raised
                line = self._import_for(raised.name)
                if line is None or not self._add_import(line):
                    break
            except TypeError as raised:
                error = raised
                mended = self._without_variance_signs(source)
                if mended == source:
                    break
                source = mended
            except Exception as raised:
                error = raised
                break
            else:
                return source, None
        return None, error

    def _import_for(self, name: str | None) -> str | None:
        """The import that a forgotten name wants; None: not clear."""
        if not name:
            return None
        missing = object()
        found = getattr(self._module, name, missing)
        if isinstance(found, types.ModuleType):
            return f"import {found.__name__}" if found.__name__ == name else f"import {found.__name__} as {name}"
        if found is not missing:
            return f"from {self._module.__name__} import {name}"
        if name in sys.modules or name in sys.stdlib_module_names:
            return f"import {name}"
        for module in (types, typing):
            if hasattr(module, name):
                return f"from {module.__name__} import {name}"
        return None

    def _without_variance_signs(self, source: str) -> str:
        """`~T`, `+T` and `-T` are how type variables print themselves, but are no expressions."""
        for name, value in self._namespace.items():
            if isinstance(value, typing.TypeVar):
                source = re.sub(rf"[~+-]{name}\b", name, source)
        return source

    def _skip_reason(self, node: ast.stmt) -> str:
        """Why the test could not but fail, whatever the function does; empty: it could."""
        assert isinstance(node, ast.FunctionDef)
        given = [keyword for call in node.decorator_list if isinstance(call, ast.Call) for keyword in call.keywords]
        unknown = [keyword.arg or "**" for keyword in given if "st.nothing()" in ast.unparse(keyword.value)]
        if unknown:
            return f"replace st.nothing(): no strategy is known for {', '.join(unknown)}"
        for keyword in given:
            if unusable := self._unusable(keyword.value):
                return f"replace the strategy for {keyword.arg or '**'}: {unusable}"
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and self._is_async(call.func):
                return f"{ast.unparse(call.func)} is async: await it"
        return ""

    def _unusable(self, expression: ast.expr) -> str:
        """What hypothesis says against a strategy; empty: nothing. Nothing is drawn from it, for that runs code."""
        try:
            eval(ast.unparse(expression), self._namespace).validate()
        except Exception as error:
            return describe(error)
        return ""

    def _is_async(self, function: ast.expr) -> bool:
        names: list[str] = []
        while isinstance(function, ast.Attribute):
            names.insert(0, function.attr)
            function = function.value
        if not isinstance(function, ast.Name):
            return False
        found = self._namespace.get(function.id)
        for name in names:
            found = getattr(found, name, None)
        return inspect.iscoroutinefunction(found)


def _execute(source: str, namespace: dict[str, Any]) -> None:
    # Not inherited: this module's `from __future__ import annotations`, under which wrong annotations would pass.
    exec(compile(source, "<tests>", "exec", dont_inherit=True), namespace)


def _segment(node: ast.stmt, text: str) -> str:
    """The lines of a statement, decorators included."""
    decorators = node.decorator_list if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])
