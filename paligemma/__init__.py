# SPDX-License-Identifier: Apache-2.0
"""PaliGemma: SigLIP, one projection and a Gemma decoder; its sizes are stated in `gemma.config`."""
