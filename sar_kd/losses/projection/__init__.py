"""Byte-prefix projection: distillation between models with different tokenizers.

Wherever either tokenizer starts a token, both models' distributions are summed into classes of tokens that the two
vocabularies share, and their divergence is added to the loss. `alignment` finds the positions and the classes;
`marginals` sums logits into classes, `joint` adds up the two ways (paths) in which the coarser tokenizer can reach a
class: its token ends before the class, or continues with it; `truncated` does both for a
teacher's top k, `loss` forms values and gradients.

A worked example
----------------
The text "lower!". The teacher's tokenizer is the coarser one, with fewer and longer tokens:

    byte       0     3   5
    teacher    lower     !      vocabulary: low, lower, lowers, s, !
    student    low   er  !      vocabulary: low, er, s, !

Byte 0. Both start a token, so it is a common boundary, and the positions that predict the two tokens are a pair. The
student's tokenizer splits lowers into low|er|s: a teacher token belongs to the class of the student token that comes
first.

    class             low                      s      !        no class
    teacher tokens    low, lower, lowers       s      !
    teacher           .2 + .4 + .1 = .7        .1     .2
    student tokens    low                      s      !        er
    student           .6                       .1     .1       .2
    normalised        .75                      .125   .125

No teacher token begins with er, so er has no class and takes no part: the student does not learn that er is rare.

Byte 3. Only the student starts a token, inside the teacher's: three bytes of that token, its prefix "low", came before.
The teacher's distribution at byte 0, conditioned on the prefix, gives the probabilities of the continuation. Three
tokens begin with "low": low .2, lower .4 and lowers .1.

    class             er                       end of the teacher's token
    teacher tokens    lower, lowers            low
    teacher           (.4 + .1) / .7 = .714    .2 / .7 = .286
    student tokens    er                       all others
    student           .6                       .4

(Had the text a teacher token before this one, that token could have gone on over "low" too, if the vocabulary has such
tokens. Then the weights of both paths are added: `marginals.continuing_log_probs`.)

If the token had ended here, the teacher's next token would need a forward pass over a different tokenization. So the
end is one class, compared with all student tokens that do not continue the teacher's token.

Byte 5. A common boundary again. The teacher reaches a class by both paths: its token ends and the next token is of that
class, or its token continues with it. By the distribution at byte 0, conditioned on the prefix "lower", the token is
lower (it ends) with .4 / (.4 + .1) = .8, and lowers (it continues with s) with .2. In the teacher's next distribution
the classes low, s and ! have .25, .25 and .5.

    class             low              s                       !        no class
    teacher           .8 * .25 = .2    .8 * .25 + .2 = .4      .4
    student           .1               .3                      .4       .2
    normalised        .125             .375                    .5

The loss is T^2 times the sum of D(teacher, student) over the three bytes: for the forward KL and T = 1
.0234 + .0284 + .0306 nats. Where the teacher starts a token inside one of the student's, the roles are exchanged. With
equal tokenizers every boundary is common and every class one token: the loss is the token-level divergence.

A teacher truncated to its top 1 has, at byte 0, the token lower only: the class low is known with .4, and the tail of
.6 is one class more; the student has .75 and .25. At byte 3 this teacher is not compared: the known
tokens that begin with "low" must hold at least the tail's mass, and lower has .4, the tail .6.
"""
