"""Train the ViT of vit.py on handwritten digits, and save what timm saves, and one batch of images.

python train_vit.py [--seconds 60]
"""

import argparse
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from vit import build


def main() -> None:
    """Train, and save a checkpoint."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    began, step = time.monotonic(), 0
    while (past := (time.monotonic() - began) / options.seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * past))
        chosen = torch.randint(1500, (64,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
    model.eval()
    with torch.no_grad():
        right = (model(images[1500:]).argmax(-1) == labels[1500:]).float().mean().item()
    print(f"{step} steps, {right:.1%} of the test images right")

    checkpoint = {"epoch": 1, "arch": "my_vit", "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(checkpoint | {"args": options, "metric": right}, "last.pth.tar")
    np.savez("example.npz", images=images[:2].numpy())


if __name__ == "__main__":
    main()
