"""A user with their own code: a norm class, a model, a factory and weights; this package is not changed."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ibnorm_export import models
from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.errors import CheckpointError, ExportError
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.models import LoadedModel, registry
from ibnorm_export.verifier.verify import verify

#: What such a user has on disk. Their lambda multiplies, their norms are written from the paper, one
#: has no bias, one is used twice, and a float32 constant is forced in forward.
CODE = """
import torch
from torch import nn

from ibnorm_export import IBNormSpec
from ibnorm_export.models import CustomModel, InputSpec, register_adapter


class MyNorm(nn.Module):
    def __init__(self, size, lam, eps=1e-5, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.lam, self.eps = lam, eps

    def forward(self, x):
        mu = x.mean(-1, keepdim=True)
        s = mu + (x - mu).sign() * torch.log1p(self.lam * (x - mu).abs()) / self.lam
        y = (s - s.mean(-1, keepdim=True)) / (s.var(-1, keepdim=True, unbiased=False) + self.eps).sqrt() * self.weight
        return y if self.bias is None else y + self.bias


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.inside = nn.Linear(6, 16)
        self.norm1, self.norm2 = MyNorm(16, 0.5), MyNorm(16, 3.0, 1e-3, bias=False)
        self.last = self.norm1
        self.out = nn.Linear(16, 3)

    def forward(self, ids, features):
        x = self.norm1(self.embed(ids) + self.inside(features))
        hidden = self.norm2(x + torch.tanh(x))
        return self.out(self.last(hidden)), hidden


register_adapter(MyNorm, lambda m: IBNormSpec.from_convention("L", m.lam, epsilon=m.eps, convention="multiply"))


def build():
    return CustomModel(
        Net(),
        inputs=(InputSpec("ids", ("batch", "time"), False), InputSpec("features", ("batch", "time", 6), True)),
        outputs=("scores", "hidden"),
    )


def build_only_the_network():
    return Net()


def needs_an_argument(size):
    return build()


def broken():
    raise ZeroDivisionError("my own mistake")


a_number = 3
"""


@dataclass(frozen=True)
class User:
    """Their folder, their state dict, and their model as they run it."""

    folder: Path
    state: dict[str, torch.Tensor]
    module: nn.Module

    def save(self, name: str) -> Path:
        path = self.folder / name
        if path.suffix == ".safetensors":  # rejects tensors that share memory, as `last` and `norm1` do
            save_file({k: v for k, v in self.state.items() if not k.startswith("last.")}, path)
        else:
            torch.save({"state_dict": self.state, "epoch": 3} if "nested" in name else self.state, path)
        return path


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[User]:
    (tmp_path / "mymodel.py").write_text(CODE)
    (tmp_path / "has_a_bug.py").write_text("import no_such_package_of_mine\n")
    (tmp_path / "does_not_parse.py").write_text("def build(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    adapters = dict(registry._ADAPTERS)
    importlib.invalidate_caches()
    module = importlib.import_module("mymodel").Net().eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    yield User(tmp_path, module.state_dict(), module)
    registry._ADAPTERS.clear()
    registry._ADAPTERS.update(adapters)
    for name in ("mymodel", "has_a_bug", "does_not_parse"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("file", ["w.safetensors", "w.pt", "nested.pt"])
def test_load_export_verify(user: User, file: str) -> None:
    model = models.load(user.save(file), model="mymodel:build")
    assert model.family == "custom"
    specs = {path: (s.lambd, s.epsilon, s.scale, s.bias) for path, s in model.norms.items()}
    first = (2.0, 1e-5 / 4, True, True)
    assert specs == {"norm1": first, "norm2": (1 / 3, 1e-3 * 9, True, False), "last": first}
    exported = export(model, user.folder / "m.onnx")
    assert [n.op_type for n in exported.norms] == ["IBNormL"] * 3
    report = verify(exported, model)
    assert report, report.findings


def test_the_converted_model_computes_what_the_users_own_does(user: User) -> None:
    model = models.load(user.save("w.pt"), model="mymodel:build")
    ids, features = torch.randint(0, 11, (3, 5)), torch.randn(3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = user.module.double()(ids, features)
        got = model.entry(model.in_float64())(ids, features)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_shared_norm_stays_shared(user: User) -> None:
    module = models.load(user.save("w.pt"), model="mymodel:build").module
    assert module.last.weight is module.norm1.weight


def test_half_precision(user: User) -> None:
    model = models.load(user.save("w.pt"), model="mymodel:build")
    exported = export(model, user.folder / "m.onnx", options=ExportOptions(dtype=DType.FP16))
    assert (exported.dtype, [t.dtype for t in exported.outputs]) == ("fp16", ["fp16", "fp16"])
    report = verify(exported, model)
    assert report, report.findings


def test_a_fault_in_a_custom_model_is_found(user: User) -> None:
    """The adapter's conversion of lambda is checked: 1 / lambda instead of lambda fails."""
    model = models.load(user.save("w.pt"), model="mymodel:build")
    path = export(model, user.folder / "m.onnx").path
    proto = onnx.load(path)
    for attribute in next(n for n in proto.graph.node if n.op_type == "IBNormL").attribute:
        if attribute.name == "lambd":
            attribute.f = 1 / attribute.f
    onnx.save(proto, path)
    report = verify(type(export(model, user.folder / "good.onnx"))(path), model)
    assert not report
    assert not report.numeric
    assert any("lambd" in str(f) and "norm1" in str(f) for f in report.findings)


def test_samples_are_the_users_own(user: User) -> None:
    (user.folder / "with_samples.py").write_text(
        "import dataclasses\nimport numpy as np\nfrom mymodel import build as plain\n"
        "def build():\n"
        "    def sample(rng, index):\n"
        "        return {'ids': np.full((1, index + 1), 10), 'features': np.ones((1, index + 1, 6), np.float32)}\n"
        "    return dataclasses.replace(plain(), sample=sample)\n"
    )
    model = models.load(user.save("w.pt"), model="with_samples:build")
    assert model.sample(np.random.default_rng(0), 2)["ids"].tolist() == [[10, 10, 10]]
    sys.modules.pop("with_samples")


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("", "package.module:factory"),
        ("mymodel", "package.module:factory"),
        (":build", "package.module:factory"),
        ("mymodel:", "package.module:factory"),
        ("nowhere_at_all:build", "nowhere_at_all"),
        ("mymodel.deeper:build", "mymodel"),
        ("mymodel:nothing", "nothing"),
        ("mymodel:a_number", "not callable"),
        ("mymodel:build_only_the_network", "CustomModel"),
        ("mymodel:needs_an_argument", "needs_an_argument"),
        ("mymodel:broken", "my own mistake"),
        ("has_a_bug:build", "no_such_package_of_mine"),
        ("does_not_parse:build", "does_not_parse"),
        (".mymodel:build", ".mymodel"),
    ],
)
def test_a_bad_factory_is_one_clear_line(user: User, reference: str, expected: str) -> None:
    weights = user.save("w.pt")
    with pytest.raises(CheckpointError) as caught:
        models.load(weights, model=reference)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert expected in message


def test_weights_that_do_not_fit_are_named(user: User) -> None:
    user.state["extra"] = torch.ones(1)
    del user.state["out.bias"]
    user.state["embed.weight"] = torch.ones(2, 2)
    with pytest.raises(CheckpointError) as caught:
        models.load(user.save("w.pt"), model="mymodel:build")
    for word in ("1 missing (out.bias)", "(extra)", "embed.weight: file (2, 2), model (11, 16)"):
        assert word in str(caught.value)


class RunsCode:
    """Unpickled without care, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_cannot_run_code(user: User) -> None:
    proof = user.folder / "proof"
    for content in (RunsCode(proof), {"state_dict": user.state, "extra": RunsCode(proof)}):
        torch.save(content, user.folder / "w.pt")
        with pytest.raises(CheckpointError, match=r"w\.pt contains builtins\.getattr, which is not plain data"):
            models.load(user.folder / "w.pt", model="mymodel:build")
        (user.folder / "w.pt").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(CheckpointError, match=r"w\.pt is "):
            models.load(user.folder / "w.pt", model="mymodel:build")
    assert not proof.exists()


@pytest.mark.parametrize("file", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("cut", [0, 10, 500, -1])
def test_a_truncated_state_dict(user: User, file: str, cut: int) -> None:
    path = user.save(file)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"w\.[a-z]+ is (truncated|empty, so it is truncated)"):
        models.load(path, model="mymodel:build")


def test_a_file_that_holds_something_else(user: User) -> None:
    for content in ([1, 2], {"a": 1}, torch.ones(2), {"state_dict": [1]}):
        torch.save(content, user.folder / "w.pt")
        with pytest.raises(CheckpointError, match="does not contain a state dict"):
            models.load(user.folder / "w.pt", model="mymodel:build")
    (user.folder / "w.npz").touch()
    with pytest.raises(CheckpointError, match="npz is empty"):
        models.load(user.folder / "w.npz", model="mymodel:build")


#: Models that do not return what they declare, and models that return what no node has computed.
ENDS = """
import numpy as np
import torch
from torch import nn

from ibnorm_export import IBNormSpec
from ibnorm_export.models import CustomModel, InputSpec
from ibnorm_export.op.torch_op import IBNorm

SPEC = IBNormSpec("L", 4.0, epsilon=1e-5)
X = (InputSpec("x", ("batch", 16), True),)


class Net(nn.Module):
    def __init__(self, returned):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 16), IBNorm(16, SPEC), nn.Linear(16, 4)
        self.returned = returned

    def forward(self, x):
        hidden = self.norm(self.first(x))
        return self.returned(self, x, hidden, self.last(hidden))


def declaring(returned, *outputs, inputs=X, **more):
    torch.manual_seed(0)
    return lambda: CustomModel(Net(returned), inputs, outputs=outputs, **more)


def scores(net, x, hidden, y):
    return y


def fails(rng, index):
    raise ZeroDivisionError("my own mistake")


input_again = declaring(lambda net, x, hidden, y: (y, x), "p", "q")
twice = declaring(lambda net, x, hidden, y: (y, y, hidden), "p", "q", "r")
all_kinds = declaring(
    lambda net, x, hidden, y: (x, y, net.first.weight, y, x, net.first.weight, net.last.bias, y.clone(), hidden + 1),
    *"abcdefghi",
)
too_few = declaring(scores, "a", "b")
too_many = declaring(lambda net, x, hidden, y: (y, hidden), "a")
by_name = declaring(lambda net, x, hidden, y: {"a": y}, "a")
holey = declaring(lambda net, x, hidden, y: (y, None), "a", "b")
nothing = declaring(scores)
like_an_input = declaring(scores, "x")
like_a_weight = declaring(scores, "y", inputs=(InputSpec("first.weight", ("batch", 16), True),))
fine_but_sample_fails = declaring(scores, "y", sample=fails)
fine_but_sample_lacks_one = declaring(scores, "y", sample=lambda rng, index: {"z": np.zeros((2, 16), np.float32)})
fine_but_sample_is_a_list = declaring(scores, "y", sample=lambda rng, index: {"x": [1.0]})
fine_but_sample_is_bare = declaring(scores, "y", sample=lambda rng, index: np.zeros((2, 16), np.float32))
fine_but_sample_gives_more = declaring(
    scores, "y", sample=lambda rng, index: {"more": 1, "x": np.ones((2, 16), np.float32)}
)


def without_parameters():
    norm = IBNorm(16, IBNormSpec("T", 4.0, epsilon=1e-5, scale=False, bias=False))
    return CustomModel(nn.Sequential(norm), X, outputs=("y",))
"""


@pytest.fixture
def ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], LoadedModel]]:
    """Load the model of one factory of `ENDS`."""
    (tmp_path / "my_ends.py").write_text(ENDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    importlib.invalidate_caches()

    def load(factory: str) -> LoadedModel:
        custom = getattr(importlib.import_module("my_ends"), factory)()
        torch.save(custom.module.state_dict(), "w.pt")
        return models.load("w.pt", model=f"my_ends:{factory}")

    yield load
    sys.modules.pop("my_ends", None)


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        ("input_again", ExportOptions()),
        ("twice", ExportOptions()),
        ("all_kinds", ExportOptions(dtype=DType.FP16)),
        ("all_kinds", ExportOptions(inline=True)),
    ],
)
def test_an_output_may_be_an_input_a_weight_or_another_output(
    ends: Callable[[str], LoadedModel], factory: str, options: ExportOptions
) -> None:
    model = ends(factory)
    exported = export(model, "m.onnx", options=options)
    assert [t.name for t in exported.inputs] == ["x"]
    assert [t.name for t in exported.outputs] == list(model.outputs)
    report = verify(exported, model)
    assert report, report.findings


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("too_few", "forward returns 1 tensor but CustomModel.outputs has 2 names (a, b)"),
        ("too_many", "forward returns 2 tensors but CustomModel.outputs has 1 name (a)"),
        ("by_name", "forward returned dict"),
        ("holey", "a tuple of tensors"),
        ("nothing", "outputs []; there must be at least one of each"),
        (
            "like_an_input",
            "inputs are ['x'], outputs ['x']; there must be at least one of each, and every name must be unique",
        ),
        ("like_a_weight", "unique and no weight's name"),
        ("without_parameters", "no floating-point parameter"),
    ],
)
def test_inputs_and_outputs_must_be_as_declared(
    ends: Callable[[str], LoadedModel], factory: str, expected: str
) -> None:
    with pytest.raises((CheckpointError, ExportError)) as caught:
        export(ends(factory), "m.onnx")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert expected in message
    assert not Path("m.onnx").exists()


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (("first.weight",), "would be called ['first.weight_1'], but it declares ['first.weight']"),
        (("a", "b"), "returns 1 tensor but declares 2 output names (a, b)"),
    ],
)
def test_a_graph_with_other_outputs_than_declared_is_not_written(
    ends: Callable[[str], LoadedModel], outputs: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(ExportError) as caught:
        export(replace(ends("fine_but_sample_fails"), outputs=outputs), "m.onnx")
    assert expected in str(caught.value)
    assert not Path("m.onnx").exists()


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("fine_but_sample_fails", "sample raised ZeroDivisionError: my own mistake"),
        (
            "fine_but_sample_lacks_one",
            "sample returned {'z': 'ndarray'}; it must return a dict of NumPy arrays with the keys ['x']",
        ),
        ("fine_but_sample_is_a_list", "sample returned {'x': 'list'}"),
        ("fine_but_sample_is_bare", "sample returned ndarray"),
    ],
)
def test_a_bad_sample_is_one_clear_line(ends: Callable[[str], LoadedModel], factory: str, expected: str) -> None:
    model = ends(factory)
    with pytest.raises(CheckpointError) as caught:
        model.sample(np.random.default_rng(0), 0)
    assert len(str(caught.value).splitlines()) == 1
    assert expected in str(caught.value)


def test_a_sample_may_hold_more_than_the_inputs(ends: Callable[[str], LoadedModel]) -> None:
    assert list(ends("fine_but_sample_gives_more").sample(np.random.default_rng(0), 0)) == ["x"]
