"""Feature maps that are difficult for codecs, by name."""

import torch

SHAPE = (24, 4, 3)


def maps(count: int, seed: int = 0) -> torch.Tensor:
    """Correlated channels and positions, a mean, and views of different strength."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, 24, generator=torch.Generator().manual_seed(99)) * torch.logspace(0, -2, 24)
    noise = torch.randn(count, 24, 4, 3, generator=generator)
    smooth = noise + noise.mean(dim=(2, 3), keepdim=True) * 2
    strength = torch.rand(count, 1, 1, 1, generator=generator) * 3 + 0.5
    return (torch.einsum("cd,bdhw->bchw", mixing, smooth) * strength + mixing[:, :1, None]).contiguous()


def cases() -> dict[str, torch.Tensor]:
    base = maps(3, seed=5)
    outlier, sparse, one_token, mixed = base.clone(), base.relu(), torch.zeros(3, *SHAPE), base.clone()
    outlier[:, 7] *= 300
    one_token[:, :, 2, 1] = base[:, :, 0, 0]
    mixed[:, :, 0] *= 1e-4
    signs = torch.randint(0, 2, (3, *SHAPE), generator=torch.Generator().manual_seed(3)).float() * 2 - 1
    steps = torch.arange(3 * 24 * 12).view(3, 4, 3, 24).permute(0, 3, 1, 2) % 24 * 10.5
    return {
        "usual": base,
        "random": torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)),
        "zeros": torch.zeros(3, *SHAPE),
        "constant": torch.full((3, *SHAPE), 3.7),
        "constant channels": base[:, :, :1, :1].expand(3, *SHAPE).contiguous(),
        "sparse": sparse,
        "outlier channel": outlier,
        "tiny": base * 1e-6,
        "below float16": base * 1e-12,
        "large": base * (3000 / base.abs().max()),
        "one token": one_token,
        "tokens of two sizes": mixed,
        "sign noise": signs * 100,
        "between codes": (steps * signs).contiguous(),
        "alternating": (steps % 2 * 200 - 100).contiguous(),
    }
