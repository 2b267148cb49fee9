"""A plain module in memory: exported, verified and timed without a folder, a factory or an adapter."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from ibnorm_export import BenchOptions, CheckpointError, ExportError, InputSpec, bench, export, from_module, verify
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.models.in_memory import from_module_of_file
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.runtimes.torch import Float64TorchRunner
from tests.support.stranger_norms import PlainElementNorm

SIZE = 16


class StrangerNorm(nn.Module):
    """Their lambda multiplies, the variance is unbiased, and scale and bias have their own names."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        c = d.sign() * torch.log1p(3 * d.abs()) / 3
        return self.gamma * (c - c.mean(-1, keepdim=True)) / (c.var(-1, keepdim=True) + 1e-3).sqrt() + self.beta


class Outputs(OrderedDict):  # type: ignore[type-arg]  # as ModelOutput of transformers
    """A dict with attributes."""


@dataclasses.dataclass
class Answer:
    scores: Tensor
    loss: Tensor | None = None


class Net(nn.Module):
    """`shape` makes what forward returns."""

    def __init__(self, shape: Callable[[Tensor, Tensor], Any] = lambda y, h: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(11, SIZE), StrangerNorm()
        self.out = nn.Linear(SIZE, 3)
        self.shape = shape

    def forward(self, ids: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Any:
        hidden = self.norm(self.embed(ids)) * scale
        if mask is not None:
            hidden = hidden * mask[..., None]
        return self.shape(self.out(hidden), hidden)


def ids(batch: int = 2, length: int = 5) -> Tensor:
    return torch.arange(10, 10 - batch * length, -1).reshape(batch, length).abs()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A network in training mode, with a mask and a constant, and its file."""
    net = Net(lambda y, h: {"scores": y, "past": None, "hidden": h}).train()
    path = tmp_path_factory.mktemp("memory") / "m.onnx"
    export(net, path, inputs={"ids": ids(), "mask": torch.ones(2, 5, dtype=torch.bool), "scale": 0.5})
    return net, path


def test_the_file_has_names_of_forward_and_of_its_outputs(exported: tuple[nn.Module, Path]) -> None:
    file = from_module_of_file(*exported_file(exported))
    assert file.inputs == (InputSpec("ids", ("batch_size", 5), False), InputSpec("mask", ("batch_size", 5), False))
    assert file.outputs == ("scores", "hidden")
    assert list(file.norms) == ["norm"]
    assert file.arguments["integers"] == {"mask": "bool"}
    assert file.arguments["constants"] == {"scale": 0.5}
    drawn = [file.sample(np.random.default_rng(0), index) for index in range(4)]
    assert max(sample["ids"].max() for sample in drawn) == 10
    assert all((sample["mask"] == 1).all() for sample in drawn), "as in the example"


def exported_file(exported: tuple[nn.Module, Path]) -> tuple[nn.Module, Any]:
    from ibnorm_export import ExportedModel

    return exported[0], ExportedModel(exported[1])


def test_verify_and_bench_need_no_inputs_again(exported: tuple[nn.Module, Path]) -> None:
    net, path = exported
    report = verify(path, net)
    assert report, report.findings
    assert report.static is not None
    assert report.static.norms == 1
    assert report.numeric is not None
    assert report.numeric.mapping is not None
    assert report.numeric.mapping.norms[0].norm == "StrangerNorm"
    times = bench(path, net, against=["torch"], options=BenchOptions(rounds=2, sizes={"batch": 2}))
    assert times


def test_other_weights_fail(exported: tuple[nn.Module, Path]) -> None:
    net, path = exported
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.get_parameter("norm.gamma")[3] += 0.01
    report = verify(path, other)
    assert not report
    assert any("another copy" in note for note in report.notes)


def test_the_callers_module_does_not_change() -> None:
    net = Net().train()
    net.out.requires_grad_(False)
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in net.state_dict().items()}
    calls: list[int] = []
    net.norm.register_forward_hook(lambda *_: calls.append(1))
    model = from_module(net, ids())
    model.call(model.module, ids())
    assert net.training
    assert type(net.norm) is StrangerNorm
    assert [p.requires_grad for p in net.out.parameters()] == [False, False]
    assert net.embed.weight.requires_grad
    assert {n: (t.data_ptr(), True) for n, t in net.state_dict().items()} == {
        n: (pointer, bool(torch.equal(t, net.state_dict()[n]))) for n, (t, pointer) in before.items()
    }
    assert len(net.norm._forward_hooks) == 1


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        (lambda y, h: y, ("output",)),
        (lambda y, h: (y, h), ("output", "output_1")),
        (lambda y, h: [y, None, h], ("output", "output_2")),
        (lambda y, h: {"b": y, "a": h}, ("b", "a")),
        (lambda y, h: Outputs(logits=y, cache=None), ("logits",)),
        (lambda y, h: Answer(y), ("scores",)),
        (lambda y, h: {"past": (y, h)}, ("past", "past_1")),
        (lambda y, h: {"ids": y}, ("ids_output",)),
        (lambda y, h: (y, {"x": h}), ("output", "output_1_x")),
    ],
)
def test_outputs_of_every_form_have_names(shape: Callable[[Tensor, Tensor], Any], names: tuple[str, ...]) -> None:
    model = from_module(Net(shape), ids())
    assert model.outputs == names
    assert len(model.call(model.module, ids(3))) == len(names)


def test_names_of_outputs_may_be_given() -> None:
    assert from_module(Net(), ids(), outputs=("scores",)).outputs == ("scores",)
    with pytest.raises(CheckpointError, match="returns 1 tensor"):
        from_module(Net(), ids(), outputs=("a", "b"))


@pytest.mark.parametrize(
    ("dynamic", "shape"),
    [
        (None, ("batch_size", 5)),
        ({}, (2, 5)),
        ({0: "batch", 1: "time"}, ("batch", "time")),
        ({"ids": {1: "time"}}, (2, "time")),
    ],
)
def test_axes_are_dynamic_as_stated(dynamic: Any, shape: tuple[int | str, ...]) -> None:
    model = from_module(Net(), ids(), dynamic=dynamic)
    assert model.inputs == (InputSpec("ids", shape, False),)
    for index in range(5):
        drawn = model.sample(np.random.default_rng(0), index)["ids"]
        assert drawn.min() >= 0
        assert drawn.max() <= 10
        assert all(isinstance(s, str) or s == size for s, size in zip(shape, drawn.shape, strict=True))


def test_a_tuple_a_dict_specs_and_numpy_arrays_are_inputs() -> None:
    mask = torch.ones(2, 5)
    specs = (InputSpec("ids", ("batch_size", 5), False), InputSpec("mask", ("batch_size", 5), True))
    for given in ((ids(), mask), {"ids": ids(), "mask": mask}, specs, {"ids": ids().numpy(), "mask": mask.numpy()}):
        assert from_module(Net(), given).inputs == specs


@pytest.mark.parametrize(
    ("module", "given", "words"),
    [
        (Net(), (ids(), ids(), 1.0), "input 'scale' is float"),
        (Net(), (ids(), None, 1.0, ids()), "takes 3"),
        (Net(), {"tokens": ids()}, "forward of Net takes ids, mask, scale, not tokens"),
        (Net(), {"scale": 1.0}, "inputs has no tensor"),
        (Net(), ids() + 100, "IndexError"),
        (Net(lambda y, h: None), ids(), "returns no tensor"),
        (Net(lambda y, h: (y, "text")), ids(), "returns str"),
        (Net(), ids().to(torch.complex64), "complex64"),
        (nn.Sequential(nn.Tanh()), torch.randn(2, 3), "no floating-point parameter"),
        (nn.Linear(2, 2, device="meta"), torch.randn(2, 2), "device 'meta'"),
        (StrangerNorm(), torch.randn(2, SIZE), "the model itself is a norm"),
        ("a text", ids(), "the model is str"),
    ],
)
def test_what_cannot_be_used_is_one_clear_line(module: Any, given: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_module(module, given)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_axis_that_is_not_there_is_one_clear_line() -> None:
    with pytest.raises(CheckpointError, match="dynamic names axis 2 of ids"):
        from_module(Net(), ids(), dynamic={"ids": {2: "time"}})
    with pytest.raises(CheckpointError, match="are not inputs"):
        from_module(Net(), ids(), dynamic={"tokens": {0: "batch"}})
    with pytest.raises(ExportError, match="example inputs"):
        export(Net(), "m.onnx")


def truth(model: LoadedModel) -> np.ndarray[Any, Any]:
    return Float64TorchRunner(model, model.truth()).run({"ids": ids().numpy()})[model.outputs[0]]


def test_a_forward_bound_to_the_instance_computes_with_the_copys_weights() -> None:
    """The truth is float64: a forward that were bound to the original would compute in float32."""

    def doubled(self: Any, ids: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Any:
        return 2 * Net.forward(self, ids, mask, scale)

    plain, patched = Net(), Net()
    patched.forward = types.MethodType(doubled, patched)  # type: ignore[method-assign]  # what is tested
    model = from_module(patched, ids())
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        expected = 2 * exact(ids()).numpy()
    np.testing.assert_allclose(truth(model), expected, rtol=1e-12)
    with torch.no_grad():
        patched.out.weight.zero_()
    assert np.abs(truth(model)).max() < np.abs(expected).max(), "the copy shares the weights"


def test_a_function_as_forward_of_an_instance_is_refused() -> None:
    net = Net()
    old = net.forward
    net.forward = lambda ids: old(ids)  # type: ignore[method-assign, assignment]  # what is tested
    with pytest.raises(CheckpointError, match="`forward` that was set on the instance"):
        from_module(net, ids())
    outer = nn.Sequential(Net())
    outer[0].forward = lambda ids: ids  # type: ignore[method-assign, assignment]  # what is tested
    with pytest.raises(CheckpointError, match=r"0 \(Net\) has a `forward`"):
        from_module(outer, ids())


class Around(nn.Module):
    """A model around a stranger's norm, which it may use as `use` does."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.norm, self.use = nn.Linear(SIZE, SIZE), StrangerNorm(), use

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        result: Tensor = self.norm(x) if self.use is None else self.use(self.norm, x)
        return result


def test_a_part_that_is_compiled_is_the_part_itself_in_the_copy() -> None:
    net = Around()
    net.norm = torch.compile(net.norm, backend="eager")
    model = from_module(net, torch.randn(2, SIZE))
    assert isinstance(model.module.norm, IBNorm)
    assert isinstance(net.norm, torch._dynamo.OptimizedModule), "the caller's module does not change"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_inside_a_model_is_refused() -> None:
    net = Around()
    net.norm = torch.jit.trace(net.norm.eval(), torch.randn(2, SIZE))  # type: ignore[no-untyped-call]  # PyTorch's
    with pytest.raises(CheckpointError, match=r"norm .* is TorchScript: use the module that it was made from"):
        from_module(net, torch.randn(2, SIZE))


def test_a_norm_of_which_the_model_uses_more_than_its_call_stays() -> None:
    """An attribute or a method that IBNorm does not have."""
    net = Around(lambda norm, x: norm(x) * norm.extra)
    net.norm.extra = 0.5
    model = from_module(net, torch.randn(2, SIZE))
    assert isinstance(model.module.norm, StrangerNorm)
    (note,) = model.notes
    assert note.startswith("norm: exported as their own operators")
    assert "extra" in note


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(SIZE, 11, bias=False)
        self.out.weight = self.embed.weight
        self.again = self.norm
        self.register_buffer("table", torch.randn(SIZE, dtype=torch.float16))

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]  # fewer arguments
        return self.out(self.again(self.norm(self.embed(ids) + self.table.to(self.embed.weight.dtype))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tied_weights_shared_norms_and_half_precision(dtype: torch.dtype) -> None:
    net = Tied().to(dtype).eval()
    model = from_module(net, ids())
    assert model.module.out.weight is model.module.embed.weight
    assert model.module.again.weight is model.module.norm.weight
    exact = copy.deepcopy(net).double()
    with torch.no_grad():
        np.testing.assert_allclose(truth(model), exact(ids()).numpy(), rtol=1e-11)


def test_wrappers_of_training_are_removed() -> None:
    assert type(from_module(nn.DataParallel(Net()), ids()).module) is Net
    assert type(from_module(torch.compile(Net()), ids()).module) is Net


def test_a_class_of_another_name_is_found_by_itself_or_with_inner_modules_by_norm_class() -> None:
    net = Net()
    net.norm.__class__ = type("Squash", (StrangerNorm,), {})
    assert list(from_module(net, ids()).norms) == ["norm"]
    net.norm.inner = nn.Identity()
    model = from_module(net, ids())
    assert not model.norms
    assert "norm_class" in model.notes[0]
    assert list(from_module(net, ids(), norm_class=StrangerNorm).norms) == ["norm"]


def test_an_axis_of_the_users_own_name_has_the_size_of_the_example(tmp_path: Path) -> None:
    model = from_module(Net(), ids(), dynamic={0: "batch", 1: "time"})
    export(model, tmp_path / "m.onnx")
    assert bench(tmp_path / "m.onnx", options=BenchOptions(rounds=1)).inputs["ids"] == (1, 5)
    assert bench(tmp_path / "m.onnx", options=BenchOptions(rounds=1, sizes={"time": 3})).inputs["ids"] == (1, 3)
    assert bench(tmp_path / "m.onnx", options=BenchOptions(rounds=1, sizes={"sequence_length": 4})).inputs["ids"] == (
        1,
        4,
    )
    report = verify(tmp_path / "m.onnx", model)
    assert report.numeric is not None
    assert "time other than 1, 3, 5: give your own inputs (--inputs FILE.npz) to cover them" in str(report)


class OutsideNorm(StrangerNorm):
    """No member of the family: epsilon is outside the root."""

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        c = torch.tanh(d / 4)
        c = c - c.mean(-1, keepdim=True)
        return self.gamma * c / (c.std(-1, keepdim=True, unbiased=False) + 1e-2) + self.beta


def test_a_scale_for_each_element_follows_the_node(tmp_path: Path) -> None:
    """The node normalises the whole image; scale and bias of the shape of an image are the stranger's parameters."""
    net = nn.Sequential(PlainElementNorm(), nn.Flatten(), nn.Linear(120, 3)).eval()
    x = torch.randn(3, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    exported = export(net, tmp_path / "m.onnx", inputs=x)
    assert exported.operators["ai.ibnorm::IBNormL"] == 1
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        wanted = copy.deepcopy(net).double()(x.double()).numpy()
    assert np.linalg.norm(got - wanted) < 2e-6 * np.linalg.norm(wanted)


def test_a_norm_that_is_no_member_is_exported_as_its_own_operators(tmp_path: Path) -> None:
    net = Net()
    net.norm = OutsideNorm()
    model = from_module(net, ids())
    assert not model.norms
    (note,) = model.notes
    assert note.startswith("norm (OutsideNorm) is exported as its own operators, no fused kernel: epsilon")
    file = export(model, tmp_path / "m.onnx")
    assert not file.norms
    report = verify(file, net)
    assert report, report.findings
    assert note in report.notes
    assert report.static
    assert bench(file, net, options=BenchOptions(rounds=1, sizes={"batch_size": 1}))


#: A process that imports nothing of this package: the file in plain ONNX Runtime against the stranger's class.
STRANGER = """
import sys

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, sys.argv[1])
from stranger import Net

net = Net().double().eval()
net.load_state_dict(torch.load(sys.argv[1] + "/w.pt", weights_only=True))
x = np.random.default_rng(1).standard_normal((64, 6)) * np.logspace(-2, 1, 64)[:, None]
x = x.astype(np.float32)
with torch.no_grad():
    expected = net(torch.from_numpy(x).double()).numpy()
(actual,) = onnxruntime.InferenceSession(sys.argv[1] + "/m.onnx").run(None, {"x": x})
print(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
assert not any(name.startswith("ibnorm") for name in sys.modules)
"""

CODE = """
import torch
from torch import nn


class GemmaLikeNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(32))

    def forward(self, x):
        d = x - x.mean(-1, keepdim=True)
        c = d.sign() * torch.log1p(d.abs() / 2) * 2
        c = c - c.mean(-1, keepdim=True)
        return (1 + self.weight) * c / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + 1e-3) / 2 ** 0.5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 32), GemmaLikeNorm(), nn.GELU(), nn.Linear(32, 32), GemmaLikeNorm())

    def forward(self, x):
        return self.layers(x)
"""


def test_the_file_computes_what_the_strangers_code_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end, without a line of this package on the other side."""
    (tmp_path / "stranger.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib

    torch.manual_seed(0)
    net = importlib.import_module("stranger").Net()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    file = export(net, tmp_path / "m.onnx", inputs=torch.randn(4, 6))
    sys.modules.pop("stranger")
    assert len(file.norms) == 2
    done = subprocess.run([sys.executable, "-c", STRANGER, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2e-6


def test_a_factory_may_return_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ibnorm_export import ExportedModel, load

    (tmp_path / "plain.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    import importlib

    net = importlib.import_module("plain").Net()
    torch.save(net.state_dict(), "w.pt")
    with pytest.raises(CheckpointError, match=r"--inputs FILE\.npz"):
        load("w.pt", "plain:Net")
    model = load("w.pt", "plain:Net", inputs={"x": np.zeros((2, 6), np.float32)})
    assert (model.source, list(model.norms)) == ("w.pt", ["layers.1", "layers.4"])
    export(model, "m.onnx")
    report = verify("m.onnx", load("w.pt", "plain:Net", inputs=ExportedModel("m.onnx")))
    assert report, report.findings
    assert not any("another copy" in note for note in report.notes)
    sys.modules.pop("plain")
