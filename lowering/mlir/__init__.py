"""The portable lowering: a call as MLIR, through torch-mlir, and compiled by IREE. Not a public interface.

The declaration is traced as plain torch code (:mod:`.programs`), imported into a dialect (:mod:`.emission`), or, for the
streaming form, written as IREE's online reduction (:mod:`.streaming`); :mod:`.iree` compiles and runs it. Nothing here is
imported before it is asked for: torch-mlir and IREE are the extra ``parallax-compile[mlir]``.
"""
