# SPDX-License-Identifier: Apache-2.0
"""The vision modules under the paths of the official package, version 4: `gm.nn.vision._vision` and its neighbours.

They are defined in `gm/vision`.
"""
