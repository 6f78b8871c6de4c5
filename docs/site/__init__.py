"""The documentation as web pages, woven from the sources: `python -m docs.site`.

    __main__    the command                       equations   plain text → MathML
    build       reads all, writes all             prose       docstrings → HTML
    shapes      measures; scenes: what is run     weave       a file → rows of prose and code
    names       definitions; linking: their use   code, guides, pages: HTML

Equations become MathML and not KaTeX: all current browsers draw it, so a page needs no script and no fonts for it, and
there is no TeX between what a head says and what is shown. No library reads the notation of the heads, and to write
MathML is no more than to write TeX.
"""
