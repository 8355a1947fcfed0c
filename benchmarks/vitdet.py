"""Our ViTDet beside the reference form, interleaved: attention, backbone, whole detector, saved activations.

The reference form is ViTDet's arithmetic as its authors write it, in plain torch: explicit logits and softmax,
windows padded before the linear layers, tables interpolated in every forward pass, LayerNorm over channels from single
operations, torchvision's Faster R-CNN around it. Both have the same weights. On a CPU the figures are CPU seconds of
one thread, so that other work on the machine disturbs them less; on a GPU they are wall seconds between
synchronisations. Medians of the rounds; a ratio above 1 means that ours is faster, or keeps less.

    python benchmarks/vitdet.py                     about 15 minutes of one core
    python benchmarks/vitdet.py --quick             one minute
    python benchmarks/vitdet.py --device cuda --precision bf16 --batch 8
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.ops import MultiScaleRoIAlign

from boxwright import registry
from boxwright.models.attention import Form
from boxwright.models.vit import ViT
from boxwright.types import Batch

CLASSES = 20
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = [form for form in get_args(Form) if form != "auto"]


# ------ The reference form


class ReferenceAttention(nn.Module):
    """Keys as ours. (B, H, W, D) → (B, H, W, D)."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, D = x.shape
        n, d = B * self.heads, D // self.heads
        q, k, v = self.qkv(x).reshape(B, H * W, 3, self.heads, d).permute(2, 0, 3, 1, 4).reshape(3, n, H * W, d)
        grid = q.reshape(n, H, W, d)
        by_row = torch.einsum("nyxd,yvd->nyxv", grid, self._rows(self.rel_pos_h, H))
        by_column = torch.einsum("nyxd,xud->nyxu", grid, self._rows(self.rel_pos_w, W))
        logits = ((q * d**-0.5) @ k.transpose(-2, -1)).view(n, H, W, H, W)
        logits = logits + by_row[:, :, :, :, None] + by_column[:, :, :, None, :]
        weights = logits.view(n, H * W, H * W).softmax(dim=-1)
        y = (weights @ v).view(B, self.heads, H, W, d).permute(0, 2, 3, 1, 4).reshape(B, H, W, D)
        return self.proj(y)

    @staticmethod
    def _rows(table: Tensor, side: int) -> Tensor:
        if len(table) != 2 * side - 1:
            table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
        place = torch.arange(side, device=table.device)
        return table[place[:, None] - place[None, :] + side - 1]


class ReferenceBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int, side: int, drop: float) -> None:
        super().__init__()
        self.window = window
        self.drop = drop
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = ReferenceAttention(width, heads, window or side)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, D = x.shape
        y = self.norm1(x)
        if self.window:
            s = self.window
            y = F.pad(y, (0, 0, 0, -W % s, 0, -H % s))
            down, across = y.shape[1] // s, y.shape[2] // s
            y = y.view(B, down, s, across, s, D).permute(0, 1, 3, 2, 4, 5).reshape(-1, s, s, D)
            y = self.attn(y).view(B, down, across, s, s, D).permute(0, 1, 3, 2, 4, 5)
            y = y.reshape(B, down * s, across * s, D)[:, :H, :W].contiguous()
        else:
            y = self.attn(y)
        x = x + self._dropped(y)
        return x + self._dropped(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))

    def _dropped(self, y: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return y
        return y * y.new_empty(len(y), 1, 1, 1).bernoulli_(1 - self.drop).div_(1 - self.drop)


class ReferenceViT(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, global_blocks: tuple[int, ...], drop_path: float) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 16, 16)})
        self.pos_embed = nn.Parameter(torch.zeros(1, 197, width))
        self.blocks = nn.ModuleList(
            ReferenceBlock(width, heads, 0 if i in global_blocks else 14, 64, drop_path * i / (depth - 1))
            for i in range(depth)
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["proj"](images).permute(0, 2, 3, 1)
        table = self.pos_embed[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=x.shape[1:3], mode="bicubic", align_corners=False)
        x = x + table.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)


class ReferenceNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W), from single operations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        normed = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * normed + self.bias[:, None, None]


class ReferencePyramid(nn.Module):
    """Keys as ours."""

    def __init__(self, D: int) -> None:
        super().__init__()
        double = nn.ConvTranspose2d
        scaled = {
            "simfp_2": [double(D, D // 2, 2, 2), ReferenceNorm(D // 2), nn.GELU(), double(D // 2, D // 4, 2, 2)],
            "simfp_3": [double(D, D // 2, 2, 2)],
            "simfp_4": [],
            "simfp_5": [nn.MaxPool2d(2, 2)],
        }
        for (name, layers), source in zip(scaled.items(), (D // 4, D // 2, D, D), strict=True):
            for kernel, channels in ((1, source), (3, 256)):
                conv = nn.Conv2d(channels, 256, kernel, padding=kernel // 2, bias=False)
                layers.append(Normed(conv, ReferenceNorm(256)))
            self.add_module(name, nn.Sequential(*layers))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = {name.replace("simf", ""): layers(x) for name, layers in self.named_children()}
        return levels | {"p_6": F.max_pool2d(levels["p_5"], kernel_size=1, stride=2)}


class Normed(nn.Module):
    """A convolution and its norm under the keys `weight` and `norm.*`."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.padding, self.norm = conv.weight, conv.padding, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.weight, padding=self.padding))


class ReferenceBackbone(nn.Module):
    def __init__(self, drop_path: float = 0.1) -> None:
        super().__init__()
        self.body = ReferenceViT(768, 12, 12, (2, 5, 8, 11), drop_path)
        self.fpn = ReferencePyramid(768)
        self.out_channels = 256

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(images))


class ReferenceDetector(nn.Module):
    """torchvision's Faster R-CNN around the reference backbone; it never resizes, as pictures come in its size."""

    def __init__(self, size: int, drop_path: float = 0.1) -> None:
        super().__init__()
        pool = MultiScaleRoIAlign([f"p_{i}" for i in range(2, 7)], output_size=7, sampling_ratio=2)
        self.net = TorchvisionFasterRCNN(
            ReferenceBackbone(drop_path), CLASSES + 1, min_size=size, max_size=size, box_roi_pool=pool
        )

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        targets = [{"boxes": b, "labels": x + 1} for b, x in zip(batch.boxes, batch.labels, strict=True)]
        return self.net([image.float() / 255 for image in batch.images], targets)

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[dict[str, Tensor]]:
        return self.net([image.float() / 255 for image in batch.images])


# ------ Measuring


class Bench:
    """Where, in which precision and how often things are run."""

    def __init__(self, device: str, precision: str, rounds: int) -> None:
        self.device, self.type, self.rounds = device, PRECISIONS[precision], rounds

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.device, dtype=self.type, enabled=self.type is not None)

    def seconds(self, run: Callable[[], object]) -> float:
        if self.device == "cpu":
            started = time.process_time()
            run()
            return time.process_time() - started
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def compare(self, title: str, cases: Mapping[str, Callable[[], object]]) -> None:
        """Run all cases once to warm up, then in turn; a line each with its ratio to the first."""
        for run in cases.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(self.rounds):
            for name, run in cases.items():
                times[name].append(self.seconds(run))
        medians = {name: statistics.median(values) for name, values in times.items()}
        first = next(iter(medians.values()))
        print(f"\n{title}")
        for name, median in medians.items():
            print(f"  {name:34} {median:9.4f} s   fastest {min(times[name]):9.4f} s   {first / median:5.2f} x")

    def forward(self, net: nn.Module, x: Tensor) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad(), self.autocast():
                net(x)

        return run

    def both_ways(self, net: nn.Module, x: Tensor) -> Callable[[], object]:
        def run() -> None:
            net.zero_grad(set_to_none=True)
            with self.autocast():
                total = _sum(net(x))
            total.backward()

        return run

    def step(self, detector: nn.Module, batch: Batch) -> Callable[[], object]:
        def run() -> None:
            detector.zero_grad(set_to_none=True)
            with self.autocast():
                total = sum(detector.losses(batch).values())
            total.backward()

        return run

    def prediction(self, detector: nn.Module, batch: Batch) -> Callable[[], object]:
        def run() -> None:
            with self.autocast():
                detector.predict(batch)

        return run


def _sum(out: Tensor | Mapping[object, Tensor]) -> Tensor:
    return out.sum() if isinstance(out, Tensor) else torch.stack([level.sum() for level in out.values()]).sum()


@contextlib.contextmanager
def saved_bytes(net: nn.Module) -> Iterator[list[int]]:
    """The bytes of all storages that wait for the backward pass, the network's own left out."""
    own = {value.untyped_storage().data_ptr() for value in net.state_dict().values()}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no storage is freed and its place counted twice
    result = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
            result[0] = sum(seen.values())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield result


def pictures(size: int, count: int, device: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 8, 2, generator=generator) * size * 0.6
    side = (0.1 + 0.3 * torch.rand(count, 8, 2, generator=generator)) * size
    return Batch(
        ids=tuple(str(i) for i in range(count)),
        images=torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator),
        sizes=((size, size),) * count,
        boxes=tuple(torch.cat([corner, corner + side], dim=2)),
        labels=tuple(torch.randint(0, CLASSES, (count, 8), generator=generator)),
        difficult=(torch.zeros(8, dtype=torch.bool),) * count,
    ).to(device)


def randomise(net: nn.Module) -> None:
    """Relative tables and biases away from zero, where they begin."""
    torch.manual_seed(0)
    for name, parameter in net.named_parameters():
        if "rel_pos" in name or name.endswith("qkv.bias"):
            nn.init.normal_(parameter, std=0.1)


def same_weights(ours: nn.Module, reference: nn.Module) -> None:
    reference.load_state_dict({k: v for k, v in ours.state_dict().items() if k not in ("pixel_mean", "pixel_std")})


# ------ What is compared


def attention_forms(bench: Bench, side: int, batch: int) -> None:
    for kind, window in (("global", 0), ("window", 14)):
        x = torch.randn(batch, side, side, 768, device=bench.device, requires_grad=True)
        reference = ReferenceBlock(768, 12, window, 64, drop=0.0).to(bench.device).eval()
        forward = {"reference": bench.forward(reference, x)}
        both_ways = {"reference": bench.both_ways(reference, x)}
        for form in FORMS:
            vit = ViT(width=768, depth=1, heads=12, global_blocks=() if window else (0,), attention=form)
            block = vit.blocks[0].to(bench.device).eval()
            block.load_state_dict(reference.state_dict())
            forward[form], both_ways[form] = bench.forward(block, x), bench.both_ways(block, x)
        bench.compare(f"one {kind} block, {batch} x {side} x {side} tokens, forward", forward)
        bench.compare(f"one {kind} block, {batch} x {side} x {side} tokens, forward and backward", both_ways)


def backbone(bench: Bench, size: int, batch: int, forms: list[Form]) -> None:
    reference = ReferenceBackbone().to(bench.device)
    images = torch.randn(batch, 3, size, size, device=bench.device)
    nets: dict[str, nn.Module] = {"reference": reference}
    for form in forms:
        net = registry.build("fasterrcnn_vitdet", num_classes=CLASSES).backbone
        for block in net.body.blocks:
            block.attn.form = form
        randomise(net)
        same_weights(net, reference)
        nets[f"ours, {form}"] = net.to(bench.device)
    with torch.no_grad():
        maps = [list(net.eval()(images).values()) for net in nets.values()]
    worst = max(((a - b).abs().max() / a.abs().max()).item() for m in maps[1:] for a, b in zip(maps[0], m, strict=True))
    print(f"\nlargest difference of a map, relative to its largest value: {worst:.1e}")
    what = f"backbone and pyramid, {batch} x {size} px"
    bench.compare(f"{what}, inference", {name: bench.forward(net, images) for name, net in nets.items()})
    steps = {name: bench.both_ways(net.train(), images) for name, net in nets.items()}
    bench.compare(f"{what}, training step", steps)


def detector(bench: Bench, size: int, batch: int) -> None:
    ours = registry.build("fasterrcnn_vitdet", num_classes=CLASSES)
    randomise(ours)
    reference = ReferenceDetector(size)
    same_weights(ours, reference.net)
    nets = {"reference": reference.to(bench.device), "ours": ours.to(bench.device)}
    one, some = pictures(size, 1, bench.device), pictures(size, batch, bench.device)
    for net in nets.values():
        net.eval()
    found, expected = ours.predict(one)[0], reference.predict(one)[0]
    if len(found) == len(expected["boxes"]):
        boxes = (torch.from_numpy(found.boxes) - expected["boxes"].cpu()).abs().max().item()
        print(f"\n{len(found)} boxes each, at most {boxes:.1e} px apart")
    else:
        print(f"\n{len(found)} boxes, reference {len(expected['boxes'])}")
    what = f"{size} px, batch"
    bench.compare(f"detector, {what} 1, prediction", {n: bench.prediction(net, one) for n, net in nets.items()})
    for net in nets.values():
        net.train()
    bench.compare(f"detector, {what} {batch}, losses and backward", {n: bench.step(m, some) for n, m in nets.items()})


def activations(bench: Bench, size: int) -> None:
    """Of a training step on one picture; nothing dropped, since what is dropped is not kept either."""
    batch = pictures(size, 1, bench.device)
    nets = {
        "reference": ReferenceDetector(size, drop_path=0.0),
        "ours": registry.build("fasterrcnn_vitdet", num_classes=CLASSES, drop_path=0.0),
        "ours, checkpoint_blocks": registry.build(
            "fasterrcnn_vitdet", num_classes=CLASSES, drop_path=0.0, checkpoint_blocks=True
        ),
    }
    print(f"\nactivations saved for the backward pass, 1 x {size} px")
    first = 0
    for name, net in nets.items():
        net.to(bench.device).train()
        with saved_bytes(net) as saved, bench.autocast():
            total = sum(net.losses(batch).values())
        del total
        first = first or saved[0]
        print(f"  {name:34} {saved[0] / 2**20:9.0f} MiB   {first / saved[0]:5.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 px and one round")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=tuple(PRECISIONS))
    parser.add_argument("--batch", type=int, default=1, help="of training steps and of backbone and attention")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("attention", "backbone", "detector", "activations"))
    options = parser.parse_args()
    size, rounds = (256, 1) if options.quick else (640, options.rounds)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench = Bench(options.device, options.precision, rounds)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "one CPU thread"
    print(f"{name}, torch {torch.__version__}, {options.precision}, {rounds} rounds")
    parts: dict[str, Callable[[], None]] = {
        "attention": lambda: attention_forms(bench, size // 16, options.batch),
        "backbone": lambda: backbone(bench, size, options.batch, ["auto"] if options.device == "cpu" else FORMS),
        "detector": lambda: detector(bench, size, options.batch),
        "activations": lambda: activations(bench, size),
    }
    for part in [options.only] if options.only else parts:
        parts[part]()


if __name__ == "__main__":
    main()
