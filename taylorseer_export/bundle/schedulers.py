"""The schedulers that a bundle may name: those of diffusers that turn a prediction of noise, or of a velocity, into the
next latents. A name is looked up in diffusers only where it stands here.
"""

SCHEDULERS = frozenset(
    """
    CMStochasticIterativeScheduler CogVideoXDDIMScheduler CogVideoXDPMScheduler CosineDPMSolverMultistepScheduler
    DDIMInverseScheduler DDIMParallelScheduler DDIMScheduler DDPMParallelScheduler DDPMScheduler DEISMultistepScheduler
    DPMSolverMultistepInverseScheduler DPMSolverMultistepScheduler DPMSolverSDEScheduler DPMSolverSinglestepScheduler
    EDMDPMSolverMultistepScheduler EDMEulerScheduler EulerAncestralDiscreteScheduler EulerDiscreteScheduler
    FlowMatchEulerDiscreteScheduler FlowMatchHeunDiscreteScheduler FlowMatchLCMScheduler HeunDiscreteScheduler
    IPNDMScheduler KDPM2AncestralDiscreteScheduler KDPM2DiscreteScheduler LCMScheduler LMSDiscreteScheduler
    LTXEulerAncestralRFScheduler PNDMScheduler SASolverScheduler SCMScheduler TCDScheduler UniPCMultistepScheduler
    none
    """.split()
)
