from __future__ import annotations

import inspect
import textwrap

import numpy as np
import pytest

from subspan.probe import (
    SyntaxTree,
    TreeTuple,
    code_tree,
    code_trees,
    permuted_trees,
    right_branching,
    tree_score,
    tree_to_tuple,
    tuple_to_tree,
)

E = "<empty>"


def tree(tokens: str, *nodes: tuple[str, int, int]) -> SyntaxTree:
    return SyntaxTree(tuple(tokens), nodes)


CASES = {
    "one token": (tree("a"), TreeTuple((), (), (E,))),
    "a chain over one token": (tree("a", ("m", 0, 1), ("e", 0, 1)), TreeTuple((), (), ("m<sep>e",))),
    "two": (tree("ab", ("p", 0, 2)), TreeTuple((1,), ("p",), (E, E))),
    "five": (tree("abcde", ("p", 0, 5)), TreeTuple((4, 3, 2, 1), ("p", E, E, E), (E,) * 5)),
    "a chain": (tree("ab", ("m", 0, 2), ("e", 0, 2)), TreeTuple((1,), ("m<sep>e",), (E, E))),
    "on the left": (tree("abc", ("p", 0, 3), ("q", 0, 2)), TreeTuple((1, 2), ("q", "p"), (E, E, E))),
    "in the middle": (
        tree("abcd", ("p", 0, 4), ("q", 1, 3), ("u", 2, 3), ("v", 3, 4)),
        TreeTuple((3, 1, 2), ("p", "q", E), (E, E, "u", "v")),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_hand_cases(name: str) -> None:
    given, expected = CASES[name]
    assert tree_to_tuple(given) == expected
    assert tuple_to_tree(*expected, given.tokens) == given


def test_functions_of_the_standard_library_come_back_exactly() -> None:
    functions = [
        value for module in (textwrap, inspect) for value in vars(module).values() if inspect.isfunction(value)
    ]
    trees = code_trees([textwrap.dedent(inspect.getsource(each)) for each in functions], parser="ast").trees
    assert len(trees) > 80
    for each in trees:
        assert tuple_to_tree(*tree_to_tuple(each), each.tokens) == each


def test_only_the_order_of_heights_counts_and_the_first_of_equal_ones_parts() -> None:
    given = CASES["in the middle"][0]
    heights, labels, unary = tree_to_tuple(given)
    assert tuple_to_tree([np.exp(h) - 7 for h in heights], labels, unary, given.tokens) == given
    assert tuple_to_tree([1, 1], ["p", "q"], [E] * 3).nodes == (("p", 0, 3), ("q", 1, 3))


def test_an_empty_root_is_a_bad_one_and_other_empty_nodes_are_none() -> None:
    assert tuple_to_tree([2, 1], [E, E], [E] * 3).nodes == (("<bad-root>", 0, 3),)


def test_deep_trees_need_no_recursion() -> None:
    deep = tree("a" * 3000, *(("p", 0, 3000 - k) for k in range(2999)))
    assert tuple_to_tree(*tree_to_tuple(deep), deep.tokens) == deep


@pytest.mark.parametrize(
    "nodes",
    [
        [("p", 0, 2)],
        [("p", 0, 3), ("q", 0, 2), ("r", 1, 3)],
        [("p", 0, 3), ("q", 2, 3), ("r", 0, 1)],
        [("p", 0, 3), ("q", 1, 1)],
        [("<empty>", 0, 3)],
        [("p<sep>q", 0, 3)],
        [],
    ],
)
def test_what_is_no_tree_is_refused(nodes: list) -> None:
    with pytest.raises(ValueError, match="nodes"):
        tree("abc", *nodes)


@pytest.mark.parametrize("rows", [([1], ["p"], [E] * 3), ([1, 2], ["p"], [E] * 3), ([1, np.nan], ["p"] * 2, [E] * 3)])
def test_wrong_rows_are_refused(rows: tuple) -> None:
    with pytest.raises(ValueError, match="distances"):
        tuple_to_tree(*rows)


def test_scores_count_each_node_once() -> None:
    true = tree("abc", ("p", 0, 3), ("q", 0, 2), ("u", 2, 3))
    twice = tree("abc", ("p", 0, 3), ("q", 0, 2), ("q", 0, 2), ("w", 2, 3))
    assert tree_score(true, true) == (1, 1, 1)
    assert tree_score(true, twice) == pytest.approx((1 / 2, 2 / 3, 4 / 7))
    assert tree_score(true, twice, duplicates="published") == pytest.approx((3 / 4, 1, 6 / 7))
    assert tree_score(tree("a"), tree("a")).f1 == 1
    assert tree_score(tree("a"), tree("a", ("p", 0, 1))).f1 == 0


def test_controls_know_the_labels_alone() -> None:
    given = tree("abcd", ("m", 0, 4), ("p", 1, 4), ("p", 2, 4))
    assert right_branching([given], [4, 1])[0].nodes == (("m", 0, 4), ("p", 1, 4), ("p", 2, 4))
    (other,) = permuted_trees([given], np.random.default_rng(0))
    rows, permuted = tree_to_tuple(given), tree_to_tuple(other)
    assert sorted(rows.labels) == sorted(permuted.labels)
    assert rows != permuted


# ---------------------------------------------------------------------- code

SOURCES = {
    "x = f(1)  # one": "(Module (Assign (Name x) = (Call (Name f) ( (Constant 1) ))))",
    "def f(a, *b):\n    'doc'\n    return -a\n": "(Module (FunctionDef def f ( (arguments (arg a) , * (arg b)) ) : "
    "(Return return (UnaryOp - (Name a)))))",
    "@d\nclass A: x: int": "(Module (ClassDef @ (Name d) class A : (AnnAssign (Name x) : (Name int))))",
    "é = 'ü' + f'{é!r:>{w}}' 'b'; y": "(Module (Assign (Name é) = (BinOp (Constant 'ü') + "
    "(JoinedStr f'{é!r:>{w}}' 'b'))) ; (Expr (Name y)))",
    "if a:\r\n\tb\r\nelif c:\r\n\td": "(Module (If if (Name a) : (Expr (Name b)) "
    "(If elif (Name c) : (Expr (Name d)))))",
}


@pytest.mark.parametrize("source", SOURCES)
def test_python_by_its_own_parser(source: str) -> None:
    assert str(code_tree(source, parser="ast")) == SOURCES[source]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = f(1)  # one", "(module (expression_statement (assignment x = (call f (argument_list ( 1 ))))))"),
        ("def f():\n    'doc'\n    return f'{a}'", "(module (function_definition def f (parameters ( )) : (block "
         "(return_statement return f'{a}'))))"),
        ("def f(): 'doc'", "(module (function_definition def f (parameters ( )) :))"),
    ],
)  # fmt: skip
def test_python_by_tree_sitter(source: str, expected: str) -> None:
    pytest.importorskip("tree_sitter_python", reason="tree-sitter is not installed")
    assert str(code_tree(source, parser="tree-sitter")) == expected
    with pytest.raises(ValueError, match="parses"):
        code_tree("def f(:", parser="tree-sitter")


def test_every_token_of_a_source_is_in_its_tree_once() -> None:
    code = "".join(line.split("#")[0] for line in textwrap.dedent(inspect.getsource(textwrap.shorten)).splitlines())
    code = code[: code.index('"""')] + code[code.rindex('"""') + 3 :]
    shorten = code_tree(textwrap.dedent(inspect.getsource(textwrap.shorten)), parser="ast")
    assert "".join(shorten.tokens).replace(" ", "") == code.replace(" ", "")


@pytest.mark.parametrize("source", ["def f(:", "", "# only", "'doc'", "x\0", "(" * 1000])
def test_what_has_no_tree_is_refused_and_left_out(source: str) -> None:
    with pytest.raises(ValueError, match="source"):
        code_tree(source, parser="ast")
    assert code_trees([source, "a = b"], parser="ast").kept == [1]
    with pytest.raises(ValueError, match="none of 1"):
        code_trees([source], parser="ast")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"language": "cobol"}, "language"), ({"parser": "yacc"}, "parser"), ({"language": "go", "parser": "ast"}, "ast")],
)
def test_another_language_or_parser_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        code_tree("x", **options)
