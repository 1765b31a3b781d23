"""The opaque operators on their way out of torch's dialect: a ``func.call`` of a private function that tells the spec.

Imports torch-mlir; :mod:`.emission` imports it when it needs it.
"""

from __future__ import annotations

from typing import Any

from torch_mlir import ir
from torch_mlir.extras.fx_importer import GraphNodeImporter

from . import opaque

__all__ = ["CallImporter"]

_CALLEES = {f"parallax_compile::{name.rpartition('.')[2]}": name.replace(".", "_") for name in opaque.NAMES}


class CallImporter(GraphNodeImporter):
    """Imports an opaque operator as a call of a private function that is declared and has no body.

    The declaration carries ``parallax_compile.spec`` (JSON) and ``parallax_compile.scale`` (absent: ``1/sqrt(D)``).
    """

    def _import_torch_op_overload(self, loc: Any, node: Any, concrete_target: Any = None) -> None:
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.name not in _CALLEES:
            super()._import_torch_op_overload(loc, node, concrete_target)
            return
        *tensors, spec, scale = node.args
        operands = [self._import_argument(loc, tensor) for tensor in tensors if tensor is not None]
        results = self._unpack_node_result_types(node, schema)
        kind = ir.FunctionType.get([operand.type for operand in operands], results)
        callee = self._declared(loc, _CALLEES[schema.name], kind, spec, scale)
        attributes = {"callee": ir.FlatSymbolRefAttr.get(callee)}
        call = ir.Operation.create("func.call", attributes=attributes, results=results, operands=operands, loc=loc)
        if len(results) > 1:
            self._multi_result_nodes.add(node)
        for number, value in enumerate(call.results):
            self.bind_node_value(node, value, number)

    def _declared(self, loc: Any, stem: str, kind: Any, spec: str, scale: float | None) -> str:
        """The declaration with this type and these attributes: one for all equal calls."""
        attributes = {
            "function_type": ir.TypeAttr.get(kind),
            "sym_visibility": ir.StringAttr.get("private"),
            "parallax_compile.spec": ir.StringAttr.get(spec),
        }
        if scale is not None:
            attributes["parallax_compile.scale"] = ir.FloatAttr.get_f64(scale)
        body = self.fx_importer._m.body
        count = 0
        for operation in body.operations:
            found = operation.operation.attributes
            if "parallax_compile.spec" not in found:
                continue
            count += 1
            name = ir.StringAttr(found["sym_name"]).value
            same = all(key in found and found[key] == attribute for key, attribute in attributes.items())
            if same and name.startswith(f"{stem}_") and ("parallax_compile.scale" in found) == (scale is not None):
                return name
        name = f"{stem}_{count}"
        attributes["sym_name"] = ir.StringAttr.get(name)
        with loc, ir.InsertionPoint.at_block_begin(body):
            ir.Operation.create("func.func", attributes=attributes, regions=1)
        return name
