//! Values and gradients against the formulas in f64, in every type.

use anyhow::Result;

use crate::close::close;
use crate::operators::{self, Numbers};
use crate::run::{numbers, Case, DTYPES};

/// Rows shorter than a vector register, widths around the 16 lanes of a sum, and enough rows for several tasks.
const SHAPES: [(usize, usize); 6] = [(1, 1), (3, 7), (5, 16), (4, 65), (2, 768), (300, 100)];

#[test]
fn values_and_gradients_match_the_formulas() -> Result<()> {
    for operator in operators::all() {
        for (rows, width) in SHAPES {
            for dtype in DTYPES {
                let case = Case::new(operator, rows, width, dtype)?;
                let (fused, composed) = (case.fused()?, case.composed()?);
                let upstream = fused.results.iter().enumerate();
                let numbers = Numbers {
                    inputs: case.inputs.iter().map(numbers).collect::<Result<_>>()?,
                    upstream: upstream.map(|(i, result)| numbers(&case.upstream(i, result)?)).collect::<Result<_>>()?,
                    width,
                    dtype,
                };
                let want = (operator.formula)(&numbers);
                for (name, fused, composed, want) in [
                    ("result", fused.results, composed.results, want.results),
                    ("gradient", fused.gradients, composed.gradients, want.gradients),
                ] {
                    assert_eq!((fused.len(), composed.len()), (want.len(), want.len()), "case {case}");
                    for (index, want) in want.iter().enumerate() {
                        let (fused, composed) = (&fused[index], &composed[index]);
                        assert_eq!((fused.shape(), fused.dtype()), (composed.shape(), composed.dtype()), "case {case}");
                        close(&format!("{name} {index}"), fused, composed, want, &case)?;
                        close(&format!("composed {name} {index}"), composed, fused, want, &case)?;
                    }
                }
            }
        }
    }
    Ok(())
}
