"""What the parity tests share: reference models with random weights, saved as transformers saves them, and the one
tolerance of f32."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def close():
    """Fails unless max |a - b| <= tolerance x max |b|; b may be torch's."""

    def close(got, want, tolerance=1e-5):
        want = want.detach().float().numpy() if hasattr(want, "detach") else np.asarray(want)
        got = np.asarray(got, np.float32)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())

    return close


@pytest.fixture(scope="session")
def shaken():
    """Random weights of a scale that lets every one of them be seen: norms near 1, biases and positions not 0."""
    torch = pytest.importorskip("torch", reason="needs the parity extra")

    def shaken(model, scale=0.2):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else scale * noise)
        return model.eval()

    return shaken


@pytest.fixture(scope="session")
def bf16_is_as_good_as_torchs():
    """`ours` may be 1.5 times as far from the f32 reference as torch's own bf16 is."""

    def check(ours, theirs, reference):
        reference = reference.detach().float().numpy()
        error = np.abs(np.asarray(ours, np.float32) - reference).max()
        allowed = np.abs(theirs.detach().float().numpy() - reference).max()
        assert 0 < error <= 1.5 * allowed, f"bf16 is {error / allowed:.2f} times as far from f32 as torch's"

    return check
