"""Waveform augmentation: speed, pauses, rooms, telephones, noise, music and clipping.

`disturb` applies random changes to a clip. Samples are mono at 16 kHz, (n,) float32. Noise and
music are synthesized, so no recordings are needed. All randomness comes from the generator passed
in.
"""

import numpy as np

from ..asr.asr_audio import SAMPLE_RATE

# The probability of each disturbance. They are drawn independently.
PROBABILITIES = {
    "speed": 0.5,
    "pause": 0.4,
    "reverberation": 0.25,
    "telephone": 0.25,
    "noise": 0.4,
    "clipping": 0.05,
}
SPEED = (0.88, 1.14)  # playback speed; changes the pitch too
PAUSE_SECONDS = 0.7  # mean of an exponential distribution
LONGEST_PAUSE = 6.0  # seconds
DECAY = (0.15, 0.6)  # seconds until the echo falls by 60 dB
ECHO_LEVEL = (0.2, 0.7)  # level of the echo relative to the direct sound
SNR = (3.0, 30.0)  # dB
OVERDRIVE = (2.0, 10.0)  # gain before clipping


def disturb(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the clip as if recorded in other conditions; its words stay the same.

    Speed and pauses change its length. Its level is arbitrary: `ASRProcessor.features` normalises
    it.
    """
    speed, before, behind = draw_timing(rng)
    does = {name: rng.random() < share for name, share in PROBABILITIES.items()}
    if speed != 1.0:
        samples = resample(samples, speed)
    level = rms(samples)
    if does["reverberation"]:
        samples = reverberate(samples, rng)
    samples = np.pad(samples, (int(before * SAMPLE_RATE), int(behind * SAMPLE_RATE)))
    if does["telephone"]:
        samples = companded(samples) if rng.random() < 0.5 else samples
        samples = band_pass(samples, rng.uniform(100, 350), rng.uniform(3000, 3800))
    if does["noise"]:
        kind = (coloured_noise, coloured_noise, hum, music)[rng.integers(4)]
        sound = kind(len(samples), rng)
        samples = samples + sound * level * 10 ** (-rng.uniform(*SNR) / 20) / rms(sound)
    if does["clipping"]:
        peak = np.abs(samples).max(initial=0.0)
        limit = peak / rng.uniform(*OVERDRIVE)
        samples = np.clip(samples, -limit, limit)
    return samples.astype(np.float32)


def draw_timing(rng: np.random.Generator) -> tuple[float, float, float]:
    """Draw what changes a clip's length: its speed, and the seconds of silence on either side.

    `disturb` draws this first, so that the length of a disturbed clip is known without reading it.
    """
    speed = rng.uniform(*SPEED) if rng.random() < PROBABILITIES["speed"] else 1.0
    pauses = np.minimum(rng.exponential(PAUSE_SECONDS, 2), LONGEST_PAUSE) * (rng.random(2) < 0.7)
    before, behind = pauses if rng.random() < PROBABILITIES["pause"] else (0.0, 0.0)
    return speed, before, behind


def rms(samples: np.ndarray) -> float:
    """Root mean square, always above zero."""
    return float(np.sqrt(np.square(samples).mean() + 1e-12)) if len(samples) else 1e-6


def resample(samples: np.ndarray, speed: float) -> np.ndarray:
    """Play the clip `speed` times as fast, by linear interpolation."""
    at = np.arange(int(len(samples) / speed)) * speed
    return np.interp(at, np.arange(len(samples)), samples)


def coloured_noise(n: int, rng: np.random.Generator) -> np.ndarray:
    """n samples of white, pink or brown noise."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    frequency = np.maximum(np.fft.rfftfreq(n), 1 / n)
    return np.fft.irfft(spectrum / frequency ** (rng.integers(3) / 2), n)


def hum(n: int, rng: np.random.Generator) -> np.ndarray:
    """n samples of mains hum (50 or 60 Hz) with harmonics."""
    seconds = np.arange(n) / SAMPLE_RATE
    base = rng.choice([50.0, 60.0]) * rng.uniform(0.99, 1.01)
    total = np.zeros(n)
    for harmonic in range(1, rng.integers(2, 9)):
        phase = rng.uniform(0, 2 * np.pi)
        total += rng.random() / harmonic * np.sin(2 * np.pi * base * harmonic * seconds + phase)
    return total


def music(n: int, rng: np.random.Generator) -> np.ndarray:
    """n samples of random chords; each note is plucked and has harmonics."""
    total = np.zeros(n)
    at = 0
    while at < n:
        length = min(n - at, int(rng.uniform(0.2, 1.2) * SAMPLE_RATE))
        seconds = np.arange(length) / SAMPLE_RATE
        fade = np.exp(-rng.uniform(0.5, 5.0) * seconds)
        for note in rng.integers(-24, 24, rng.integers(1, 5)):  # semitones from A4
            pitch = 440.0 * 2 ** (note / 12)
            for harmonic in range(1, 6):
                total[at : at + length] += (
                    fade * np.sin(2 * np.pi * pitch * harmonic * seconds) / harmonic**1.5
                )
        at += length
    return total


def reverberate(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Convolve with the impulse response of a random room: decaying noise."""
    n = int(rng.uniform(*DECAY) * SAMPLE_RATE)
    echo = rng.standard_normal(n) * np.exp(-np.log(1000) * np.arange(n) / n)
    echo *= rng.uniform(*ECHO_LEVEL) / np.sqrt(np.square(echo).sum())
    echo[0] = 1.0
    size = len(samples) + n
    product = np.fft.rfft(samples, size) * np.fft.rfft(echo, size)
    return np.fft.irfft(product, size)[: len(samples)]


def band_pass(samples: np.ndarray, low: float, high: float) -> np.ndarray:
    """Keep the frequencies from `low` to `high`, in Hz."""
    spectrum = np.fft.rfft(samples)
    frequency = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    spectrum[(frequency < low) | (frequency > high)] = 0.0
    return np.fft.irfft(spectrum, len(samples))


def companded(samples: np.ndarray) -> np.ndarray:
    """Quantize to 8-bit µ-law, as a telephone line does (ITU-T G.711)."""
    peak = np.abs(samples).max(initial=1e-6)
    code = np.sign(samples) * np.log1p(255 * np.abs(samples) / peak) / np.log(256)
    code = np.round(127 * code) / 127
    return peak * np.sign(code) * np.expm1(np.abs(code) * np.log(256)) / 255
