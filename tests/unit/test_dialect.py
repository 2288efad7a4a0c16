"""The dialect's page and the examples in it. What ops refuse: tests/passes/dialect.mlir."""

from __future__ import annotations

import threading

import pytest
from torch_mlir import ir

from spikingbrain.passes import dialect
from spikingbrain.tools import gen_dialect_docs
from spikingbrain.tools.gen_dialect_docs import OpDoc, op_docs

DOCS = op_docs()


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_example_verifies(doc: OpDoc) -> None:
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.parse(doc.module())
        dialect.verify(module)
        assert doc.name in str(module)


def test_every_op_has_an_equation_or_a_contract() -> None:
    assert {doc.name for doc in DOCS} >= {
        "spikingbrain.parameter",
        "spikingbrain.linear",
        "spikingbrain.attention",
        "spikingbrain.cache_write",
        *dialect.CONTROL_OPS,
    }
    for doc in DOCS:
        assert "``" in doc.text, f"{doc.name} shows no formula"


def test_page_is_up_to_date() -> None:
    """After a change of passes/dialect.py: python -m spikingbrain.tools.gen_dialect_docs"""
    assert gen_dialect_docs.PAGE.read_text() == gen_dialect_docs.page()


def test_every_field_is_described() -> None:
    (attention,) = [doc for doc in DOCS if doc.name == "spikingbrain.attention"]
    fields = dict(attention.fields)
    assert fields["query"] == "operand" and fields["cache_keys"] == "optional operand"
    assert fields["scale"] == "float attribute" and fields["out"] == "result"


def test_loading_twice_is_harmless() -> None:
    context = dialect.load()
    assert dialect.load(context) is context


def test_threads_may_load_at_once() -> None:
    """Dialect.load() from two threads at once crashes the process without the lock in ours."""
    found: list[str] = []

    def work() -> None:
        with dialect.load(), ir.Location.unknown():
            module = ir.Module.parse(DOCS[0].module())
            dialect.verify(module)
            found.append(str(module))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8


def test_a_wrong_control_op_is_named_with_its_place() -> None:
    text = 'func.func @f(%x: index) { "spikingbrain_control.launch"(%x) : (index) -> () return }'
    with dialect.load(), ir.Location.unknown():
        module = ir.Module.parse(text)
        with pytest.raises(dialect.WrongOp, match="launch' op needs the attributes") as caught:
            dialect.verify(module)
    assert caught.value.line == 1
