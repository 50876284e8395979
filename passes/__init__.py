"""The algebra, and the way from a cascade to tile programs: pure functions, most of them `Cascade -> Cascade`.

Normal forms, in which the algebra computes
    forms normal functions rewriting    values, their constructors, functions of them, substitution
    exponents orders centred            what exponentials share, what order lets through, moving bases
    casts integers                      rounding points; which forms are integers, how wide their arithmetic is
    read lower lower_atoms write        a cascade read into forms, forms back to expressions, a cascade written anew
    inline naming fresh room wide       maps where they are read, names of what is made, new ones, recursion, f64

Derivation
    derive                              the way from a cascade as written through all of them
    separate waiting influence          what leaves a reduction, what has to wait, what outputs owe to a value
    stabilise stream element finish     sums as streams with state, one element of them, mantissas times exponentials
    normaliser emptiness neutral laws   saved normalisers, what masks leave empty, monoids of users
    ledger account told                 which rewrites fired and which barriers stand, in the user's names

Masks
    brackets predicate affine           Iverson brackets, predicates over tiles, affine forms
    ranges phases inbounds              coordinates that a predicate lets through, loops for them, reads in bounds
    flags masked flagged                what masks leave out, written out where the algebra does not follow them

Gradients and partial results
    grad reverse adjoint transpose      reverse mode, Einsum by Einsum; shares of what an expression reads
    partial pieces split fold places    states of pieces and how they merge, reductions cut apart, the best J of a fiber

Kernels
    fuse plan join apart                what runs together, what streams together, what leaves a contraction
    operands                            rows of products that are stored once
    mapped tile tiling tile_*           a cascade under a mapping; tile kernels, in layers from scope to streams
    step few_rows                       how a stream takes in a whole tile; rows of programs that share nothing
    defaults defaults_cpu defaults_gpu  the mapping where nothing was tuned, and its tiles
    registers                           what a mapping takes on chip
    extent vacant                       sizes of cascades that were made from others; what is left where a rank is empty

Telling
    count work                          passes over each rank; operations and bytes as formulas
    explain report draw layout          what castile can say about a cascade: values, text, drawing

Imports `ir`.
"""
