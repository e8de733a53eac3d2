//! The operators that have CUDA kernels, on the first GPU. Without a GPU the tests print SKIPPED; with CANDLE_FA2_REQUIRE_GPU they fail.

use anyhow::Result;
use attention_reference::draw;
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_ops::{cross_entropy, layer_norm, pool};
use rand::Rng;

use crate::against_reference::check;
use crate::errors::text;
use crate::gradient_sums::{blocks_match_f64, sums_match_f64};
use crate::loss::{all_rows_ignored, masked_class, nonfinite_row_of_a_loss};
use crate::nonfinite::nonfinite_row_of_a_norm;
use crate::operators::{self, Operator, Shapes};
use crate::properties::{only_tracked, second_backward};
use crate::run::{bits, numbers, random, Case, Outcome};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

const WITH_KERNELS: [&str; 18] = [
    "layer_norm",
    "layer_norm without bias",
    "rms_norm",
    "add_layer_norm",
    "add_rms_norm",
    "cross_entropy",
    "cross_entropy with options",
    "linear_cross_entropy",
    "linear_cross_entropy with options, in chunks",
    "gelu",
    "gelu_erf",
    "swiglu",
    "geglu",
    "embedding",
    "resize_columns, wider",
    "resize_columns, narrower",
    "rotary, half split",
    "rotary, interleaved",
];

/// The first GPU, as a device of its own: it has its own cuBLAS handle, because threads of one device share the handle's workspace.
pub fn gpu() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(gpu) => {
            // Otherwise the driver takes it back whenever a thread waits for the GPU, and a test does so after each tensor.
            pool::keep_freed_memory(&gpu).expect("the pool of the GPU");
            Some(gpu)
        }
        Err(error) if std::env::var_os("CANDLE_FA2_REQUIRE_GPU").is_some() => panic!("no CUDA device: {error}"),
        Err(_) => {
            println!("SKIPPED: no CUDA device");
            None
        }
    }
}

fn with_kernels() -> impl Iterator<Item = Operator> {
    operators::all().into_iter().filter(|operator| WITH_KERNELS.contains(&operator.name))
}

fn is_linear(operator: &Operator) -> bool {
    operator.name.starts_with("linear")
}

/// One row and many; widths of every kernel of the norms, in vectors and in single elements, and one that no kernel has.
const SHAPES: [(usize, usize); 14] = [
    (1, 1),
    (3, 7),
    (5, 16),
    (4, 65),
    (2, 768),
    (300, 100),
    (37, 1024),
    (20, 1032),
    (70, 1536),
    (9, 2047),
    (33, 3072),
    (6, 4096),
    (5, 8192),
    (2, 8200),
];

#[test]
fn values_and_gradients_match_the_formulas() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for operator in with_kernels() {
        for (rows, width) in SHAPES {
            for dtype in DTYPES {
                // The reference of a linear layer is a product of (rows, width, 2 width).
                if is_linear(&operator) && rows * width * width > 50_000_000 {
                    continue;
                }
                check(&Case::new(operator, rows, width, dtype)?.on(&gpu)?)?;
            }
        }
    }
    Ok(())
}

#[test]
fn random_shapes_match_the_formulas() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let mut random = draw::generator("random shapes on a GPU");
    for operator in with_kernels() {
        for dtype in DTYPES {
            for _ in 0..8 {
                let (rows, width) = (random.random_range(1..90), random.random_range(1..400));
                check(&Case::new(operator, rows, width, dtype)?.on(&gpu)?)?;
            }
        }
    }
    Ok(())
}

/// More rows than all multiprocessors hold at once: blocks of the norm's backward loop, and their sums are long.
#[test]
fn many_rows_match_the_formulas() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for operator in with_kernels().filter(|operator| !is_linear(operator)) {
        // The reference of the wide rows takes most of the time.
        let shapes: &[_] = if operator.name.contains("norm") { &[(5003, 768), (3001, 101)] } else { &[(3001, 101)] };
        for dtype in DTYPES {
            for &(rows, width) in shapes {
                check(&Case::new(operator, rows, width, dtype)?.on(&gpu)?)?;
            }
        }
    }
    Ok(())
}

/// Rows that begin at any element, rows that fill the shared memory of a block, and rows that do not fit.
#[test]
fn large_vocabularies_match_the_formulas() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for operator in with_kernels() {
        for dtype in DTYPES {
            match is_linear(&operator) {
                true => {
                    let shapes: [Shapes; 2] = [
                        |rows, width| vec![vec![rows, width], vec![50257, width]],
                        |rows, width| vec![vec![rows, width], vec![128256, width]],
                    ];
                    for shapes in shapes {
                        check(&Case::new(Operator { shapes, ..operator }, 17, 8, dtype)?.on(&gpu)?)?;
                    }
                }
                false if operator.name.starts_with("cross_entropy") => {
                    for vocab in [4099, 50257, 50304, 128257] {
                        check(&Case::new(operator, 7, vocab, dtype)?.on(&gpu)?)?;
                    }
                }
                false => {}
            }
        }
    }
    Ok(())
}

/// A second call, and a second backward of one graph.
#[test]
fn a_repetition_gives_the_same_bits() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for operator in with_kernels() {
        for (rows, width) in [(1027, 96), (40, 1031)] {
            let case = Case::new(operator, rows, width, DType::BF16)?.on(&gpu)?;
            let once = || -> Result<_> {
                let Outcome { results, gradients } = case.fused()?;
                Ok((bits(&results)?, bits(&gradients)?))
            };
            assert!(once()? == once()?, "two calls differ\ncase {case}");
            second_backward(&case)?;
        }
    }
    Ok(())
}

/// Views with gaps, and views without gaps whose rows are not aligned.
#[test]
fn views_give_the_same_bits() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for operator in with_kernels() {
        let case = Case::new(operator, 6, 40, DType::BF16)?.on(&gpu)?;
        let want = bits(&(operator.fused)(&case.inputs)?)?;
        let gaps = |t: &Tensor| t.pad_with_zeros(t.rank() - 1, 2, 3)?.narrow(t.rank() - 1, 2, t.dims()[t.rank() - 1]);
        let views: Vec<Tensor> = case.inputs.iter().map(gaps).collect::<candle_core::Result<_>>()?;
        assert!(views.iter().any(|view| !view.is_contiguous()));
        assert_eq!(bits(&(operator.fused)(&views)?)?, want, "case {case}");
    }
    for operator in with_kernels() {
        // Width 40 in rows of a tensor that begins at element 1: the kernels with accesses of one element.
        let mut case = Case::new(operator, 6, 40, DType::BF16)?.on(&gpu)?;
        let later =
            |t: &Tensor| t.flatten_all()?.pad_with_zeros(0, 1, 0)?.narrow(0, 1, t.elem_count())?.reshape(t.shape());
        case.inputs = case.inputs.iter().map(later).collect::<candle_core::Result<_>>()?;
        assert!(case.inputs.iter().all(|view| view.is_contiguous() && view.layout().start_offset() == 1));
        check(&case)?;
        let results = (operator.fused)(&case.inputs)?;
        let aligned = (operator.fused)(&Case::new(operator, 6, 40, DType::BF16)?.on(&gpu)?.inputs)?;
        for (result, aligned) in results.iter().zip(&aligned) {
            for (a, b) in numbers(result)?.into_iter().zip(numbers(aligned)?) {
                assert!((a - b).abs() <= 2f64.powi(-7) * b.abs().max(1.0), "{a} and {b} of case {case}");
            }
        }
    }
    Ok(())
}

/// A view of logits whose first row does not begin at 16 bytes, with its gradient.
#[test]
fn logits_may_begin_anywhere() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for (dtype, vocab) in DTYPES.into_iter().flat_map(|dtype| [13, 301].map(|vocab| (dtype, vocab))) {
        let whole = Var::from_tensor(&random("logits", &[5, vocab], dtype)?.to_device(&gpu)?)?;
        let targets = Tensor::new(&[0u32, 3, 12, 7], &gpu)?;
        let view = whole.narrow(0, 1, 4)?;
        let aligned = Var::from_tensor(&view.force_contiguous()?)?;
        let gradient = |logits: &Tensor, of: &Var| -> Result<Tensor> {
            let gradients = cross_entropy(logits, &targets)?.backward()?;
            Ok(gradients.get(of).expect("a gradient").clone())
        };
        let got = gradient(&view, &whole)?.narrow(0, 1, 4)?;
        assert_eq!(bits(&[got])?, bits(&[gradient(&aligned, &aligned)?])?, "{dtype:?}, {vocab} classes");
    }
    Ok(())
}

/// Kernels that add a gradient that waits, and those that leave the sum to another kernel. The last shapes have more rows than all
/// multiprocessors hold at once.
#[test]
fn sums_of_gradients_match_f64() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for dtype in DTYPES {
        for shape in [(5, 16), (67, 33), (2000, 96), (40, 768), (300, 1024), (40, 2048)] {
            blocks_match_f64(&gpu, dtype, shape)?;
        }
        for shape in [(5003, 768), (1501, 1032), (1201, 2048), (701, 4096), (301, 8192)] {
            sums_match_f64(&gpu, dtype, shape)?;
        }
    }
    Ok(())
}

#[test]
fn each_input_may_be_the_only_tracked_one() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    with_kernels().try_for_each(|operator| only_tracked(&Case::new(operator, 4, 24, DType::F32)?.on(&gpu)?))
}

#[test]
fn if_all_rows_are_ignored_loss_and_gradients_are_zero() -> Result<()> {
    gpu().map_or(Ok(()), |gpu| all_rows_ignored(&gpu))
}

#[test]
fn a_nonfinite_number_stays_in_its_row() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    nonfinite_row_of_a_norm(&gpu)?;
    nonfinite_row_of_a_loss(&gpu)
}

#[test]
fn minus_infinity_masks_a_class() -> Result<()> {
    gpu().map_or(Ok(()), |gpu| masked_class(&gpu))
}

/// Each has a stream of its own, and nothing orders the two.
#[test]
fn two_devices_of_one_gpu_do_not_mix() -> Result<()> {
    let (Some(gpu), Some(other)) = (gpu(), gpu()) else { return Ok(()) };
    let (x, weight) = (Tensor::ones((2, 8), DType::F32, &gpu)?, Tensor::ones(8, DType::F32, &other)?);
    assert_eq!(
        text(layer_norm(&x, &weight, None, 1e-5)),
        "weight: must be on the device of x, Cuda { gpu_id: 0 }, got another device on it; move one with to_device"
    );
    Ok(())
}

/// Nobody waits for the GPU to check targets. So a bad one shows in the loss.
#[test]
fn a_target_that_is_no_class_makes_the_loss_nan() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let logits = random("logits", &[3, 5], DType::F32)?.to_device(&gpu)?;
    for class in [5i64, -1, i64::MAX] {
        let loss = cross_entropy(&logits, &Tensor::new(&[0, class, 2], &gpu)?)?;
        assert!(loss.to_scalar::<f32>()?.is_nan());
    }
    Ok(())
}
