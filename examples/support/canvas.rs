//! What the pictures of several examples share.

use std::{error::Error, path::Path};

use plotters::prelude::*;

use super::support::write_atomic;

pub(crate) type Area<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;

pub(crate) const TITLE: (&str, i32) = ("sans-serif", 20);

/// Colours that can be told apart, one for each expert.
pub(crate) const PALETTE: [RGBColor; 8] = [
    RGBColor(230, 60, 40),
    RGBColor(40, 110, 220),
    RGBColor(50, 170, 70),
    RGBColor(250, 180, 20),
    RGBColor(140, 70, 190),
    RGBColor(20, 180, 190),
    RGBColor(240, 120, 190),
    RGBColor(110, 80, 50),
];

pub(crate) fn label() -> TextStyle<'static> {
    ("sans-serif", 15).into_font().color(&BLACK)
}

/// A block as a reader names it.
pub(crate) fn block_name(path: &str) -> String {
    path.replace(".encoder.blocks.", " block ")
}

/// Draws a picture and writes it aside, then renames it.
pub(crate) fn write(
    path: &Path,
    (width, height): (u32, u32),
    draw: impl FnOnce(&Area) -> Result<(), Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    plotters::style::register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| "the font cannot be read")?;
    let mut pixels = vec![0; width as usize * height as usize * 3];
    {
        let root = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
        root.fill(&WHITE)?;
        draw(&root.margin(10, 0, 0, 0))?;
        root.present()?;
    }
    let mut png = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_raw(width, height, pixels)
        .ok_or("the picture has another size")?
        .write_to(&mut png, image::ImageFormat::Png)?;
    write_atomic(path, png.get_ref())?;
    Ok(())
}

/// A square with a share in per cent; twice an even share is the darkest.
pub(crate) fn cell(
    area: &Area,
    (x, y): (i32, i32),
    (width, height): (i32, i32),
    share: f64,
    experts: usize,
) -> Result<(), Box<dyn Error>> {
    let dark = (share * experts as f64 / 3.0).min(1.0);
    let shade = RGBColor(255 - (200.0 * dark) as u8, 255 - (160.0 * dark) as u8, 255 - (60.0 * dark) as u8);
    area.draw(&Rectangle::new([(x, y), (x + width - 2, y + height - 2)], shade.filled()))?;
    let text = format!("{:.0}", 100.0 * share);
    let color = if dark > 0.7 { WHITE } else { BLACK };
    area.draw(&Text::new(text, (x + width / 2 - 9, y + height / 2 - 8), label().color(&color)))?;
    Ok(())
}
