# SPDX-License-Identifier: Apache-2.0
"""SigLIP, the vision tower of PaliGemma and Gemma 3; its sizes are stated in `gemma.config`."""
