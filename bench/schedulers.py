"""Our samplers and the schedulers of diffusers that equal them: sampler -> (their class, its settings, our `sampling:`).

The settings are beside those of Stable Diffusion's own scheduler file (`scheduler_settings`). Parity tests read this table too.
"""

from __future__ import annotations

LINSPACE = {"timestep_spacing": "linspace"}
SCHEDULERS = {
    "ddim": (
        "DDIMScheduler",
        {"set_alpha_to_one": False, "clip_sample": False},
        "sampler.kind=ddim times.kind=timesteps times.spacing=leading times.last=first",
    ),
    "euler": (
        "EulerDiscreteScheduler",
        LINSPACE,
        "sampler.kind=euler times.kind=timesteps times.spacing=linspace start_noise=sigma",
    ),
    "euler_ancestral": (
        "EulerAncestralDiscreteScheduler",
        LINSPACE,
        "sampler.kind=euler_ancestral times.kind=timesteps times.spacing=linspace start_noise=sigma",
    ),
    "dpm_solver": (
        "DPMSolverMultistepScheduler",
        LINSPACE,
        "sampler.kind=dpm_solver times.kind=timesteps",
    ),
    "dpm_solver_karras": (
        "DPMSolverMultistepScheduler",
        {**LINSPACE, "use_karras_sigmas": True},
        "sampler.kind=dpm_solver times.kind=karras whole_steps=true",
    ),
}
