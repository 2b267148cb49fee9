"""A copy of a right file to plant a fault in: find nodes and weights by what they do, and put nodes between."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from ibnorm_export.op.spec import DOMAIN

__all__ = ["Array", "Edit", "Nodes"]

Array = np.ndarray[Any, Any]

#: Part of the name of the weight that ends the last residual branch, by family.
_BRANCH_ENDS = {"llama": "down_proj.weight", "gpt2": "mlp.c_proj.weight", "vit": "fc2.weight"}


@dataclass
class Nodes:
    """Nodes to insert. A call adds one and returns the name of its first output.

    Args:
        edit: the file; arrays that are given as inputs become its initializers.
        made: the nodes so far.
    """

    edit: Edit
    made: list[onnx.NodeProto] = field(default_factory=list)

    def __call__(self, op_type: str, *inputs: Any, outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        names = [value if isinstance(value, str) else self.edit.constant(value) for value in inputs]
        label = self.edit.new_name(op_type.lower())
        written = [label, *(f"{label}/{i}" for i in range(1, outputs))]
        self.made.append(onnx.helper.make_node(op_type, names, written, label, domain=domain, **attributes))
        return label


@dataclass
class Edit:
    """One file with a fault in it.

    Args:
        proto: the file; it is changed.
        family: "llama", "gpt2", "vit" or "resnet".
        folder: its folder, whose other files may be changed too.
    """

    proto: onnx.ModelProto
    family: str
    _: KW_ONLY
    folder: Path
    _count: int = 0

    def new_name(self, base: str) -> str:
        """A name that the file does not have."""
        self._count += 1
        return f"planted.{self._count}.{base}"

    # ---- weights ----

    def constant(self, value: Any, name: str = "") -> str:
        """Add an initializer; numbers that are not typed are float32 or int64, half in a half-precision file."""
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        name = name or self.new_name("constant")
        tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        if array.dtype == np.float32 and self.float_type != onnx.TensorProto.FLOAT:
            tensor = onnx.helper.make_tensor(name, self.float_type, array.shape, array.reshape(-1))
        self.proto.graph.initializer.append(tensor)
        return name

    @property
    def float_type(self) -> int:
        """The element type of the file's weights."""
        dtype = json.loads(next(p.value for p in self.proto.metadata_props if p.key == "ibnorm.dtype"))
        return {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}.get(dtype, onnx.TensorProto.FLOAT)

    def tensor(self, part: str) -> onnx.TensorProto:
        """The first initializer whose name contains `part`."""
        return next(t for t in self.proto.graph.initializer if part in t.name)

    def values(self, part: str) -> Array:
        """Values of an initializer; bfloat16 in float32."""
        tensor = self.tensor(part)
        array = onnx.numpy_helper.to_array(tensor)
        return array.astype(np.float32) if tensor.data_type == onnx.TensorProto.BFLOAT16 else array.copy()

    def store(self, tensor: onnx.TensorProto, array: Array) -> None:
        """Replace the values of an initializer, whose type stays."""
        array = np.ascontiguousarray(array)
        if tensor.data_type == onnx.TensorProto.BFLOAT16:
            new = onnx.helper.make_tensor(tensor.name, tensor.data_type, array.shape, array.reshape(-1))
        else:
            new = onnx.numpy_helper.from_array(array, tensor.name)
        tensor.CopyFrom(new)

    def rewrite(self, part: str, change: Callable[[Array], Array]) -> None:
        """Change the values of the first initializer whose name contains `part`."""
        self.store(self.tensor(part), change(self.values(part)))

    def swap(self, first: str, second: str) -> None:
        """Exchange the values of two initializers of one shape."""
        one, other = self.values(first), self.values(second)
        self.store(self.tensor(first), other)
        self.store(self.tensor(second), one)

    def matrix(self) -> str:
        """Name of a matrix in the middle of the model."""
        return {"llama": "up_proj.weight", "gpt2": "mlp.c_fc.weight", "vit": "mlp.fc1.weight"}.get(
            self.family, "stages.1.layers.0.layer.1.convolution.weight"
        )

    # ---- nodes ----

    def node(self, op_type: str, part: str = "") -> onnx.NodeProto:
        """The first node of this type whose name or inputs contain `part`."""
        return next(n for n in self.proto.graph.node if n.op_type == op_type and part in f"{n.name} {list(n.input)}")

    def reader(self, part: str) -> onnx.NodeProto:
        """The first node with an input whose name contains `part`."""
        return next(n for n in self.proto.graph.node if any(part in name for name in n.input))

    def producer(self, name: str) -> onnx.NodeProto:
        """The node that writes a value."""
        return next(n for n in self.proto.graph.node if name in n.output)

    @property
    def norms(self) -> list[onnx.NodeProto]:
        """The norm nodes, in order."""
        return [node for node in self.proto.graph.node if node.domain == DOMAIN]

    def replace_reads(self, old: str, new: str) -> None:
        """Every node that reads one value reads another."""
        for node in self.proto.graph.node:
            for position, name in enumerate(node.input):
                if name == old:
                    node.input[position] = new

    def insert(self, nodes: list[onnx.NodeProto], before: onnx.NodeProto) -> None:
        """Put nodes before another one."""
        place = list(self.proto.graph.node).index(before)
        for index, node in enumerate(nodes):
            self.proto.graph.node.insert(place + index, node)

    def splice(self, name: str, build: Callable[[Nodes, str], str]) -> None:
        """Put nodes between a value and everything that reads it.

        Args:
            name: an input, a value, or an output of the graph.
            build: (nodes, value) -> the value that is read instead.
        """
        nodes = Nodes(self)
        if name in (output.name for output in self.proto.graph.output):
            before = self.new_name("before")
            for node in self.proto.graph.node:
                for position, written in enumerate(node.output):
                    if written == name:
                        node.output[position] = before
            self.replace_reads(name, before)
            result = build(nodes, before)
            nodes.made.append(onnx.helper.make_node("Identity", [result], [name], self.new_name("identity")))
            self.proto.graph.node.extend(nodes.made)
            return
        readers = [node for node in self.proto.graph.node if name in node.input]
        result = build(nodes, name)
        self.insert(nodes.made, readers[0])
        for node in readers:
            for position, read in enumerate(node.input):
                if read == name:
                    node.input[position] = result

    def splice_input(self, node: onnx.NodeProto, position: int, build: Callable[[Nodes, str], str]) -> None:
        """Put nodes between a value and one of its readers."""
        nodes = Nodes(self)
        result = build(nodes, node.input[position])
        self.insert(nodes.made, node)
        node.input[position] = result

    # ---- places that every family has ----

    @property
    def head_input(self) -> str:
        """What the matrix of the logits multiplies."""
        node = self.producer("logits")
        while node.op_type in ("Identity", "Add", "Cast", "Reshape"):
            node = self.producer(node.input[0])
        return node.input[0]

    @property
    def branch(self) -> str:
        """The output of the last residual branch."""
        if self.family == "resnet":
            return self.producer(self.node("ReduceMean", "relu").input[0]).input[0]
        node = [n for n in self.proto.graph.node if any(_BRANCH_ENDS[self.family] in name for name in n.input)][-1]
        return node.output[0]

    @property
    def model_input(self) -> str:
        """The input with the data: token ids or images."""
        return self.proto.graph.input[0].name

    # ---- attributes and metadata ----

    @staticmethod
    def set(node: onnx.NodeProto, **attributes: Any) -> None:
        """Set attributes of a node."""
        kept = [a for a in node.attribute if a.name not in attributes]
        del node.attribute[:]
        node.attribute.extend([*kept, *(onnx.helper.make_attribute(k, v) for k, v in attributes.items())])

    def claim(self, key: str, value: Any) -> None:
        """Change an entry of the metadata."""
        entry = next(p for p in self.proto.metadata_props if p.key == f"ibnorm.{key}")
        entry.value = json.dumps(value)

    def claim_new(self, key: str, value: Any) -> None:
        """Add an entry to the metadata."""
        self.proto.metadata_props.add(key=f"ibnorm.{key}", value=json.dumps(value))

    def claimed(self, key: str) -> Any:
        """An entry of the metadata."""
        return json.loads(next(p.value for p in self.proto.metadata_props if p.key == f"ibnorm.{key}"))

    def edit_json(self, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change a JSON file of the folder."""
        content = json.loads((self.folder / file).read_text())
        change(content)
        (self.folder / file).write_text(json.dumps(content))
