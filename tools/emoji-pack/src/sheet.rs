//! Tiles and sprite sheets.

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};
use resvg::{tiny_skia, usvg};

use crate::error::{Error, Result};
use crate::iconset::{Icon, IconSet};

/// The side of a tile in pixels.
pub const TILE: usize = 32;
/// How many tiles stand in a row of a sheet.
pub const PER_ROW: usize = 64;
/// How many times larger an icon is drawn before it is averaged down.
const OVERSAMPLE: usize = 4;

/// The bytes of a tile: `TILE * TILE` RGB pixels, row-major.
pub type Tile = Vec<u8>;

/// Draws an icon over white, centred, its shape kept, and averages it down to one tile.
pub fn draw(set: &IconSet, name: &str, icon: &Icon, options: &usvg::Options) -> Result<Tile> {
    let tree = usvg::Tree::from_str(&set.svg(icon), options).map_err(|source| Error::Svg {
        set: set.name.clone(),
        name: name.to_owned(),
        source,
    })?;
    let side = (TILE * OVERSAMPLE) as u32;
    let mut pixmap = tiny_skia::Pixmap::new(side, side).ok_or_else(|| Error::Pixmap {
        set: set.name.clone(),
        name: name.to_owned(),
        size: side,
    })?;
    pixmap.fill(tiny_skia::Color::WHITE);
    let (width, height) = (tree.size().width(), tree.size().height());
    let scale = side as f32 / width.max(height);
    let (dx, dy) = centre(width * scale, height * scale, side as f32);
    let transform = tiny_skia::Transform::from_row(scale, 0.0, 0.0, scale, dx, dy);
    resvg::render(&tree, transform, &mut pixmap.as_mut());
    Ok(average_down(pixmap.data(), TILE, OVERSAMPLE))
}

/// How far a box must be shifted to stand in the middle of a square.
fn centre(width: f32, height: f32, side: f32) -> (f32, f32) {
    ((side - width) / 2.0, (side - height) / 2.0)
}

/// Averages blocks of `factor * factor` opaque RGBA pixels into RGB pixels.
fn average_down(rgba: &[u8], side: usize, factor: usize) -> Vec<u8> {
    let stride = side * factor * 4;
    let count = (factor * factor) as u32;
    let mut out = Vec::with_capacity(side * side * 3);
    for y in 0..side {
        for x in 0..side {
            let mut sum = [0u32; 3];
            for row in 0..factor {
                let start = (y * factor + row) * stride + x * factor * 4;
                for pixel in rgba[start..start + factor * 4].chunks_exact(4) {
                    for (total, value) in sum.iter_mut().zip(pixel) {
                        *total += u32::from(*value);
                    }
                }
            }
            out.extend(sum.map(|total| ((total + count / 2) / count) as u8));
        }
    }
    out
}

/// The width and the height in pixels of a sheet with so many tiles.
pub fn sheet_size(tiles: usize) -> (usize, usize) {
    (PER_ROW * TILE, tiles.div_ceil(PER_ROW).max(1) * TILE)
}

/// The upper left corner of a tile in its sheet, in pixels.
pub fn tile_corner(index: usize) -> (usize, usize) {
    (index % PER_ROW * TILE, index / PER_ROW * TILE)
}

/// Lays tiles out row by row; the places after the last tile stay white.
pub fn lay_out(tiles: &[Tile]) -> Vec<u8> {
    let (width, height) = sheet_size(tiles.len());
    let mut rgb = vec![255; width * height * 3];
    for (index, tile) in tiles.iter().enumerate() {
        let (left, top) = tile_corner(index);
        for (row, line) in tile.chunks_exact(TILE * 3).enumerate() {
            let start = ((top + row) * width + left) * 3;
            rgb[start..start + TILE * 3].copy_from_slice(line);
        }
    }
    rgb
}

/// Encodes tiles as an RGB PNG sheet, as small as it gets without loss.
pub fn encode(name: &str, tiles: &[Tile], tight: bool) -> Result<Vec<u8>> {
    let (width, height) = sheet_size(tiles.len());
    let rgb = lay_out(tiles);
    if rgb.len() != width * height * 3 {
        return Err(Error::SheetSize { sheet: name.to_owned(), expected: width * height * 3, found: rgb.len() });
    }
    let mut png = Vec::new();
    PngEncoder::new_with_quality(&mut png, CompressionType::Best, FilterType::Adaptive)
        .write_image(&rgb, width as u32, height as u32, ExtendedColorType::Rgb8)
        .map_err(|source| Error::Encode { sheet: name.to_owned(), source })?;
    if !tight {
        return Ok(png);
    }
    // the pack promises 8-bit RGB, so the colour type stays as it is
    let mut options = oxipng::Options::from_preset(4);
    options.color_type_reduction = false;
    options.palette_reduction = false;
    options.bit_depth_reduction = false;
    options.grayscale_reduction = false;
    options.strip = oxipng::StripChunks::All;
    oxipng::optimize_from_memory(&png, &options).map_err(|source| Error::Optimise { sheet: name.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_stand_row_by_row() {
        assert_eq!(sheet_size(0), (2048, 32));
        assert_eq!(sheet_size(64), (2048, 32));
        assert_eq!(sheet_size(65), (2048, 64));
        assert_eq!(tile_corner(0), (0, 0));
        assert_eq!(tile_corner(63), (63 * 32, 0));
        assert_eq!(tile_corner(64), (0, 32));
    }

    #[test]
    fn a_sheet_holds_its_tiles_where_they_belong() {
        let tiles: Vec<Tile> = (0..66).map(|i| vec![i as u8; TILE * TILE * 3]).collect();
        let rgb = lay_out(&tiles);
        let (width, height) = sheet_size(tiles.len());
        assert_eq!(rgb.len(), width * height * 3);
        for index in [0, 1, 63, 64, 65] {
            let (left, top) = tile_corner(index);
            let last = ((top + TILE - 1) * width + left + TILE - 1) * 3;
            assert_eq!(rgb[(top * width + left) * 3], index as u8);
            assert_eq!(rgb[last], index as u8);
        }
        let (left, top) = tile_corner(66);
        assert_eq!(rgb[(top * width + left) * 3], 255);
    }

    #[test]
    fn blocks_are_averaged_and_rounded() {
        let mut rgba = vec![255; 4 * 4 * 4];
        rgba[0..4].copy_from_slice(&[0, 255, 1, 255]);
        let rgb = average_down(&rgba, 2, 2);
        assert_eq!(rgb.len(), 12);
        assert_eq!(&rgb[0..3], &[191, 255, 192]);
        assert!(rgb[3..].iter().all(|value| *value == 255));
    }

    #[test]
    fn a_narrow_icon_stands_in_the_middle() {
        assert_eq!(centre(64.0, 128.0, 128.0), (32.0, 0.0));
    }

    #[test]
    fn a_sheet_comes_back_from_its_png() {
        let tiles: Vec<Tile> = vec![vec![7; TILE * TILE * 3], vec![200; TILE * TILE * 3]];
        for tight in [false, true] {
            let png = encode("test", &tiles, tight).expect("PNG");
            let image = image::load_from_memory(&png).expect("decoded");
            assert_eq!(image.color(), image::ColorType::Rgb8);
            assert_eq!(image.into_rgb8().into_raw(), lay_out(&tiles));
        }
    }
}
