"""Train the GPT of model.py on the characters of a text, and save what nanoGPT saves: ckpt.pt and meta.pkl.

python train.py --text FILE [--seconds 120] [--out out]
"""

import argparse
import math
import pickle
import time
from dataclasses import asdict
from pathlib import Path

import torch
from model import GPT, GPTConfig


def main() -> None:
    """Train, and save a checkpoint."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()

    torch.manual_seed(1337)
    text = options.text.read_text(encoding="utf-8")
    characters = sorted(set(text))
    stoi = {character: token for token, character in enumerate(characters)}
    data = torch.tensor([stoi[character] for character in text])
    config = GPTConfig(vocab_size=len(characters))
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    began, step, loss = time.monotonic(), 0, math.nan
    while (past := (time.monotonic() - began) / options.seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * past))
        starts = torch.randint(len(data) - config.block_size - 1, (options.batch,)).tolist()
        x = torch.stack([data[i : i + config.block_size] for i in starts])
        y = torch.stack([data[i + 1 : i + 1 + config.block_size] for i in starts])
        found = model(x, y)[1]
        optimizer.zero_grad(set_to_none=True)
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss, step = found.item(), step + 1
        if step % 100 == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)
    print(f"{step} steps, loss {loss:.3f}")

    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": asdict(config),
        "iter_num": step,
        "best_val_loss": loss,
        "config": {key: str(value) for key, value in vars(options).items()},
    }
    torch.save(checkpoint, options.out / "ckpt.pt")
    meta = {"vocab_size": len(characters), "stoi": stoi, "itos": dict(enumerate(characters))}
    (options.out / "meta.pkl").write_bytes(pickle.dumps(meta))


if __name__ == "__main__":
    main()
