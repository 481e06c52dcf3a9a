"""orin-kit: distil, quantize, export and profile small language models for the Jetson AGX Orin.

Every verb of the command line is a function of the same name: `orin_kit.distill.distill`, `orin_kit.quantize.quantize`,
`orin_kit.export.export`, `orin_kit.profile.profile`, `orin_kit.chat.chat`, `orin_kit.demo.demo`.
"""
